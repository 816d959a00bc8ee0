"""The sections of a report about one cache: what the teacher knows, and what the file keeps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from softcache.cache import Cache, Sampled
from softcache.data.source import Source
from softcache.files.describe import describe
from softcache.join.match import join_samples
from softcache.results import cache_figures, figures
from softcache.results.knowledge import (
    VIEWS,
    Knowledge,
    ViewDivergence,
    measure_knowledge,
    measure_views,
)
from softcache.results.multi_label_section import multi_label_section
from softcache.results.page import Picture, Section, Thumbnails
from softcache.results.verdict import (
    Verdict,
    file_sentences,
    percent,
    short_number,
    teacher_sentences,
    teacher_warnings,
)

THUMBNAILS = 24


def cache_sections(
    cache: Cache, source: Source | None, verdict: Verdict, *, several: bool = False
) -> list[Section]:
    """What the teacher knows, and what the file keeps of it; the conclusions go to `verdict`.

    Args:
        cache: the cache.
        source: its samples, if they are at hand.
        several: whether the report is about more than one cache.
    """
    header = cache.header
    if header.multi_label:
        return [multi_label_section(cache, verdict)]
    public = replace(cache, path=Path(cache.path.name))
    knowledge, views = measure_knowledge(public), measure_views(public)
    name = f": {public.path}" if several else ""
    verdict.warnings += teacher_warnings(public, knowledge)
    verdict.paragraphs.append((f"The teacher{name}", teacher_sentences(public, knowledge)))
    verdict.paragraphs.append((f"The file{name}", file_sentences(public, views)))
    section = Section(f"What the teacher knows: {public.path}")
    section.notes.append(
        f"Measured on {len(knowledge.cache_rows):,} of {header.row_count:,} {header.unit}s in their first "
        f"view, at T = {header.temperature:g} unless stated otherwise."
    )
    mean = float(knowledge.entropy.mean())
    section.add_figure(
        "How sure it is",
        cache_figures.certainty(knowledge, header.temperature, header.classes),
        f"Histograms of the entropy of the soft targets, {mean:.3f} nats on average, and of their largest "
        f"probability, {percent(float(knowledge.top.mean()))} on average.",
    )
    if knowledge.calibrations:
        section.add_figure(
            "Confidence and accuracy",
            cache_figures.reliability(knowledge.calibrations),
            "Reliability diagrams: "
            + ", ".join(f"{name} ECE {c.error:.4f}" for name, c in knowledge.calibrations.items()),
            "Below the diagonal the teacher is surer than it is right, above it less sure.",
        )
    _add_similar_classes(section, public, knowledge)
    if source is not None and header.rows is None:
        _add_thumbnails(section, public, source, knowledge)
    kept = Section(f"What the file keeps: {public.path}", facts=describe(public))
    _add_encodings(kept, public)
    _add_views(kept, public, views)
    return [section, kept]


def _class_name(cache: Cache) -> Callable[[int], str]:
    names = cache.class_names
    return lambda class_id: names[class_id] if class_id < len(names) else str(class_id)


def _add_similar_classes(section: Section, cache: Cache, knowledge: Knowledge) -> None:
    """The map of mean soft targets by class, and the classes that look most alike."""
    likeness, name = knowledge.likeness, _class_name(cache)
    if len(likeness.classes) < 2:
        return
    shown = (
        "all classes that have samples"
        if likeness.all_classes
        else f"the {len(likeness.classes)} classes of the most similar pairs"
    )
    order = ", similar ones next to each other" if len(likeness.classes) > 20 else ""
    section.add_figure(
        "Classes that look alike",
        cache_figures.similar_classes(likeness, name),
        "Mean soft targets by class. Most similar: "
        + "; ".join(f"{name(p.own)}, {name(p.other)} {p.probability:.2%}" for p in likeness.pairs),
        f"Mean soft targets of {shown}{order}: a row for the class of the sample, a column for each class "
        "that the teacher sees in it. The colours span the values off the diagonal"
        + (
            ", and the cells show percent."
            if len(likeness.classes) <= cache_figures.NUMBERED
            else "."
        ),
    )


def _add_encodings(section: Section, cache: Cache) -> None:
    """The encodings that the dump measured, if there were several."""
    points = cache_figures.encoding_points(cache)
    if len(points) < 2:
        return
    max_kl = (cache.header.choice or {}).get("max_kl")
    allowed = float(max_kl) if isinstance(max_kl, int | float) else None
    section.add_figure(
        "Bytes a row against KL",
        cache_figures.encodings(points, allowed),
        "Encodings measured: "
        + "; ".join(
            f"{p.spec} {p.bytes_per_row:,} bytes, KL {short_number(p.kl)}{' (chosen)' if p.chosen else ''}"
            for p in points
        ),
        "KL(teacher ‖ stored) on rows that no encoding was fitted to, at the temperature where it is "
        f"largest; values below {figures.compact(cache_figures.LEAST_KL)} are drawn there.",
    )


def _add_views(section: Section, cache: Cache, views: ViewDivergence | None) -> None:
    if views is None:
        return
    limit = "" if views.all_views else f" Only the first {VIEWS} views were compared."
    draws = (
        " In a sampled cache, part of the difference is the noise of its draws."
        if isinstance(cache.header.encoding, Sampled)
        else ""
    )
    section.add_figure(
        "What more views add",
        cache_figures.view_divergence(views),
        "By number of views: mean KL of each view to the sample's mean "
        + ", ".join(short_number(float(value)) for value in views.divergence),
        f"How much the soft targets of one sample differ between its views, on {views.samples:,} samples. "
        f"Where the curves become flat, another view adds little.{limit}{draws}",
    )


def _add_thumbnails(section: Section, cache: Cache, source: Source, knowledge: Knowledge) -> None:
    """The samples with the highest entropy, if they are images."""
    name, source_indices = _class_name(cache), join_samples(source, cache)
    pictures = []
    for position in np.argsort(-knowledge.entropy, kind="stable")[:THUMBNAILS]:
        cache_row = int(knowledge.cache_rows[position])
        sample = source.fetch([int(source_indices[cache_row])])[0][0]
        image = figures.thumbnail(sample.numpy())
        if image is None:
            return
        seen = ", ".join(
            f"{name(int(class_id))} ({100 * probability:.2g}%)"
            for class_id, probability in zip(
                knowledge.leading[position], knowledge.leading_probabilities[position], strict=True
            )
        )
        label = int(cache.labels[cache_row])
        caption = seen if label < 0 else f"{seen}; label {name(label)}"
        pictures.append(Picture(caption, figures.as_uri(image, "png"), f"sample {cache_row}"))
    section.blocks.append(Thumbnails("Samples it is least sure of", pictures))

"""`softcache report`: what a teacher knows and what its students learned, on one page.

The page is a single file: pictures are in it, nothing is fetched, no script runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache._version import __version__
from softcache.cache import Cache, Sampled
from softcache.cache.reader import open_trainable
from softcache.data.augment import split_augment
from softcache.data.embedded import CacheSource
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.errors import MissingCacheError, SettingsError
from softcache.files.describe import describe
from softcache.join.match import join_samples
from softcache.results import figures
from softcache.results.compare import BATCHES, StudentMetrics, measure_all, open_joined
from softcache.results.metrics import best_temperature, calibration, gradient_similarity
from softcache.targets.decode import to_dense
from softcache.targets.fetch import soft_targets
from softcache.train.run_folder import Run, expand, open_run
from softcache.util.extras import import_extra
from softcache.util.files import replace_file

MOST_ROWS = 20_000  # of a cache that are looked at

MOST_VALUES = 1 << 28  # of the probabilities that are held at once

MOST_CLASSES = 60  # in the heat map

THUMBNAILS = 24

PAIRS = 10  # of similar classes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Picture:
    title: str
    uri: str
    text: str = ""  # for who cannot see it


@dataclass(frozen=True)
class Table:
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """A cache, or the runs together."""

    title: str
    facts: str = ""
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    thumbnails: list[Picture] = field(default_factory=list)


def report(
    places: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    student: Sequence[str] = (),
) -> Path:
    """Write a page about caches and runs, which `places` may name in any order.

    Args:
        data: the samples of the first cache, if it does not hold them.
        eval_data: students are measured on these.
        student: where the students' code is, if they are not built-in ones.

    Raises:
        SoftcacheError: a place is neither, or data do not fit; or softcache[report] is not there.
    """
    if not places:
        raise SettingsError("nothing to report of; name caches, or folders of softcache train")
    jinja = import_extra("jinja2", extra="report", what="softcache report")
    import_extra("matplotlib", extra="report", what="softcache report")
    caches = [open_trainable(place) for place in places if place.is_file()]
    missing = [place for place in places if not place.exists()]
    if missing:
        raise MissingCacheError(
            f"{missing[0]}: no such file or folder; name a cache or a finished run"
        )
    folders = [place.resolve() for place in expand([p for p in places if p.is_dir()])]
    runs = {name: open_run(folder) for name, folder in short_names(folders).items()}
    source = open_source(data) if data else None
    sections = []
    for number, cache in enumerate(caches):
        samples = source if number == 0 and source is not None else own_samples(cache)
        sections.append(cache_section(cache, samples))
    if runs:
        sections.append(runs_section(runs, caches, data, eval_data, student))
    text = (
        resources.files("softcache.results")
        .joinpath("report.html.jinja")
        .read_text(encoding="utf-8")
    )
    page = jinja.Environment(autoescape=True).from_string(text)
    html = page.render(sections=sections, version=__version__)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda path: path.write_text(html, encoding="utf-8"))
    return out


def short_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by as many of their last names as tell them apart: the page is shared."""
    longest = max((len(folder.parts) for folder in folders), default=1)
    for count in range(1, longest + 1):
        names = {"/".join(folder.parts[-count:]): folder for folder in folders}
        if len(names) == len(set(folders)):
            return names
    return {}


def own_samples(cache: Cache) -> Source | None:
    return CacheSource(cache) if cache.header.embeds_inputs else None


def cache_section(cache: Cache, source: Source | None) -> Section:
    """What the teacher knows, from up to MOST_ROWS rows of the first view."""
    header = cache.header
    public = replace(cache, path=Path(cache.path.name))
    found = Section(f"What the teacher knows: {public.path}", describe(public))
    count = max(1, min(header.samples, MOST_ROWS, MOST_VALUES // header.classes))
    rows = np.unique(np.linspace(0, header.samples - 1, count).astype(np.int64))
    log_probs = to_dense(
        soft_targets(cache, header.temperature, CPU)(np.zeros(len(rows), np.int64), rows)
    )
    labels = torch.from_numpy(np.array(cache.labels[rows]))
    probabilities = log_probs.double().exp().numpy()
    entropy = -(probabilities * log_probs.double().clamp(min=-1e5).numpy()).sum(-1)
    found.notes.append(
        f"From {len(rows):,} of {header.samples:,} samples, in their first view, at temperature "
        f"{header.temperature:g}. Mean entropy of the soft targets {entropy.mean():.3f} nats; of hard "
        f"labels it is 0, of no knowledge at all {math.log(header.classes):.3f}."
    )
    if header.summary and "fidelity" in header.summary:
        fidelity = header.summary["fidelity"]
        found.notes.append(
            f"Stored as {header.encoding.name}, {header.bytes_per_row:,} bytes a row; KL from the teacher "
            f"{fidelity.get('mean', float('nan')):.2g} nats on average."
        )
    add_classes(found, cache, probabilities, labels.numpy())
    found.pictures.append(
        Picture(
            "How sure it is",
            figures.as_uri(
                figures.histograms(entropy, probabilities.max(-1), math.log(header.classes))
            ),
            "histograms of entropy and of the largest probability",
        )
    )
    add_calibration(found, cache, log_probs, labels)
    if source is not None:
        add_thumbnails(found, cache, source, rows, entropy, probabilities)
    return found


def add_classes(
    section: Section,
    cache: Cache,
    probabilities: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
) -> None:
    """The heat map of mean soft targets by class, and the classes that are most alike."""
    classes, names = cache.header.classes, cache.class_names
    own = np.where(labels >= 0, labels, probabilities.argmax(-1))
    there, place = np.unique(own, return_inverse=True)
    sums = np.zeros((len(there), classes))
    np.add.at(sums, place, probabilities)
    means = sums / np.bincount(place)[:, None]  # (classes that are there, C)
    if len(there) > MOST_CLASSES:
        unsure = np.argsort(means[np.arange(len(there)), there])[:MOST_CLASSES]
        there, means = there[np.sort(unsure)], means[np.sort(unsure)]
        section.notes.append(f"The map shows the {MOST_CLASSES} classes it is least sure of.")

    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    shown = [name(int(number)) for number in there]
    section.pictures.append(
        Picture(
            "What it sees in each class",
            figures.as_uri(figures.heat_map(means[:, there], shown)),
            "mean soft targets by class",
        )
    )
    others = means.copy()
    others[np.arange(len(there)), there] = 0
    order = np.argsort(others, axis=None)[::-1][:PAIRS]
    pairs = [np.unravel_index(flat, others.shape) for flat in order]
    section.tables.append(
        Table(
            "Most alike",
            ("sample of class", "also looks like", "mean probability"),
            [
                (name(int(there[a])), name(int(b)), f"{others[a, b]:.4f}")
                for a, b in pairs
                if others[a, b] > 0
            ],
        )
    )


def add_calibration(section: Section, cache: Cache, log_probs: Tensor, labels: Tensor) -> None:
    """Reliability at T = 1, at the temperature that fits the labels best, and at the cache's own."""
    known = labels >= 0
    mixed = split_augment(cache.header.augment).mixup
    if not bool(known.any()) or mixed or isinstance(cache.header.encoding, Sampled):
        return
    rows, labels, own = log_probs[known], labels[known], cache.header.temperature
    logits = rows * own  # but for a constant
    best = best_temperature(logits, labels)
    wanted = {"T = 1": 1.0, f"T = {best:.2g}, fits best": best, f"T = {own:g}, as stored": own}
    found = {
        name: calibration(torch.log_softmax(logits / temperature, -1), labels)
        for name, temperature in wanted.items()
    }
    section.pictures.append(
        Picture(
            "Does it know when it is wrong?",
            figures.as_uri(figures.reliability(found)),
            "reliability diagrams: " + ", ".join(f"{n} {c.error:.4f}" for n, c in found.items()),
        )
    )


def add_thumbnails(
    section: Section,
    cache: Cache,
    source: Source,
    rows: npt.NDArray[np.int64],
    entropy: npt.NDArray[np.float64],
    probabilities: npt.NDArray[np.float64],
) -> None:
    """The samples that it is least sure of, if they are images."""
    places, names = join_samples(source, cache), cache.class_names
    for at in np.argsort(entropy)[::-1][:THUMBNAILS]:
        row = int(rows[at])
        image = figures.thumbnail(source.fetch([int(places[row])])[0][0].numpy())
        if image is None:
            return
        best = np.argsort(probabilities[at])[::-1][:2]
        said = ", ".join(
            f"{names[b] if b < len(names) else b} {probabilities[at, b]:.0%}" for b in best
        )
        label = int(cache.labels[row])
        own = "" if label < 0 else f"; label {names[label] if label < len(names) else label}"
        section.thumbnails.append(
            Picture(f"{said}{own}", figures.as_uri(image, "png"), f"sample {row}")
        )


def runs_section(
    runs: dict[str, Run],
    caches: Sequence[Cache],
    data: str | None,
    eval_data: str | None,
    student: Sequence[str],
) -> Section:
    """Curves, each student against its hard-label twin, accuracy against cost, and why it works."""
    found = Section("What the students learned")
    twins = {
        f"{name}/baseline": open_run(run.folder / "baseline")
        for name, run in runs.items()
        if (run.folder / "baseline" / "config.json").exists() and f"{name}/baseline" not in runs
    }
    every = runs | twins
    found.pictures.append(
        Picture(
            "Curves",
            figures.as_uri(figures.curves({name: run.metrics for name, run in every.items()})),
            "loss and test error by epoch",
        )
    )
    measured = measure_all(every, eval_data=eval_data, cache=None, data=None, student=student)
    known = next((run.facts.get("teacher_evaluation") for run in runs.values()), None)
    found.tables.append(runs_table(every, measured))
    points = {
        one.name: (100 * (1 - one.error), float(one.parameters), 1e3 * one.seconds[BATCHES[0]])
        for one in measured
        if one.error is not None
    }
    if points:
        teacher = 100 * (1 - known["errors"] / known["samples"]) if known else None
        found.pictures.append(
            Picture(
                "Accuracy against cost",
                figures.as_uri(figures.trade_off(points, teacher)),
                "accuracy against parameters and latency",
            )
        )
    add_reasons(found, runs, caches, data, student)
    return found


def runs_table(runs: dict[str, Run], measured: Sequence[StudentMetrics]) -> Table:
    """Every student, and how many errors fewer it makes than its twin."""
    errors = {one.name: one.error for one in measured}
    rows = []
    for one in measured:
        twin, own = errors.get(twin_of(one.name, runs) or ""), one.error
        gain = "" if twin is None or own is None else f"{100 * (twin - own):+.2f} points"
        facts = runs[one.name].facts
        rows.append(
            (
                one.name,
                facts["settings"]["student"],
                f"{one.parameters:,}",
                f"{one.count_macs:,}",
                f"{1e3 * one.seconds[BATCHES[0]]:.2f}",
                "-" if own is None else f"{1 - own:.2%}",
                gain,
            )
        )
    headers = (
        "run",
        "student",
        "parameters",
        "multiply-adds",
        "ms",
        "accuracy",
        "over hard labels",
    )
    return Table("Students", headers, rows)


def twin_of(name: str, runs: dict[str, Run]) -> str | None:
    """The run on hard labels that differs from this one in nothing but what it listens to."""
    listens = {"alpha", "temperature", "loss", "out"}

    def rest(run: Run) -> dict[str, Any]:
        return {k: v for k, v in run.facts["settings"].items() if k not in listens}

    return next(
        (
            other
            for other, run in runs.items()
            if run.facts["alpha"] == 0 < runs[name].facts["alpha"] and rest(run) == rest(runs[name])
        ),
        None,
    )


def add_reasons(
    section: Section,
    runs: dict[str, Run],
    caches: Sequence[Cache],
    data: str | None,
    student: Sequence[str],
) -> None:
    """Why it works: how much a soft target says, and how alike the gradients of batches are."""
    if not caches or not (data or caches[0].header.embeds_inputs):
        section.notes.append(
            "Name the cache too, with --data if it does not hold its samples, to see how alike the "
            "gradients of batches are under soft and under hard targets."
        )
        return
    cache = caches[0]
    entropy = (cache.header.summary or {}).get("entropy")
    part = open_joined(cache.path, data)
    rows = []
    for name, run in runs.items():
        if run.classes != cache.header.classes:
            continue
        similar = gradient_similarity(run.model(student), part, cache.header.temperature)
        rows.append(
            (name, *(f"{similar[k]:.3f}" if k in similar else "-" for k in ("soft", "hard")))
        )
    section.tables.append(
        Table(
            "How alike the gradients of different batches are (cosine similarity, batches of 64)",
            ("student", "soft targets", "hard labels"),
            rows,
        )
    )
    if entropy is not None:
        section.notes.append(
            f"A soft target of {cache.path.name} has {entropy:.3f} nats of entropy at T = "
            f"{cache.header.temperature:g}, a hard one 0: so much more is said of each sample. Where the "
            "gradients of batches are more alike under soft targets than under hard ones, one batch tells "
            "what another would, and each step is worth more."
        )

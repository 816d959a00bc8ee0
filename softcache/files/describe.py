"""Summaries of a cache, for people and for programs. They never import torch, so they are instant."""

from __future__ import annotations

from typing import Any

from softcache.cache import Cache, Header, Sampled


def facts(cache: Cache) -> dict[str, Any]:
    """The fields of the header, and what follows from them and the digests; ready for JSON.

    `content_id` is None and `coverage`, the share of blocks that are written, is below 1 until the
    cache is complete.
    """
    header = cache.header
    total_blocks = header.blocks * (header.views + 1)
    return header.to_json() | {
        "complete": cache.complete,
        "content_id": cache.content_id() if cache.complete else None,
        "coverage": 1 - cache.missing_blocks() / total_blocks,
        "bytes_per_sample": header.file_bytes / header.samples,
        "class_names": cache.class_names,
    }


def describe(cache: Cache, name: str | None = None) -> str:
    """The most important facts as aligned lines of text.

    Args:
        name: what to call the cache; its path by default.
    """
    header = cache.header
    values = facts(cache)
    lines = {
        "cache": f"{name or cache.path}, format {header.version[0]}.{header.version[1]}",
        "content": values["content_id"] or f"unfinished, {values['coverage']:.1%} of the blocks",
        "samples": f"{header.samples:,} of {header.data}, {header.views:,} view(s), "
        f"augmented by {header.augment or 'nothing'}, seed {header.seed}"
        + (", embedded" if header.embeds_inputs else ""),
        **_row_lines(header),
        "classes": f"{header.classes:,}: {_first_names(cache.class_names)}",
        "temperature": f"{header.temperature:g}",
        "encoding": f"{header.encoding.name}, {header.bytes_per_row:,} bytes per row",
        "size": f"{header.file_bytes:,} bytes, {values['bytes_per_sample']:,.1f} per sample",
    }
    for number, teacher in enumerate(header.teachers, 1):
        title = "teacher" if len(header.teachers) == 1 else f"teacher {number}"
        share = f", weight {teacher['weight']:.3g}" if len(header.teachers) > 1 else ""
        weights = f", weights {teacher['weights']}" if teacher.get("weights") else ""
        chosen = teacher.get("selected")
        selected = f", {chosen['classes']:,} of {chosen['of']:,} classes" if chosen else ""
        lines[title] = (
            f"{teacher['name']}, {teacher['parameters']:,} parameters{weights}{selected}{share}, in "
            f"{header.precision}"
        )
    if header.evaluation:
        errors, samples = header.evaluation["errors"], header.evaluation["samples"]
        lines["accuracy"] = (
            f"{1 - errors / samples:.2%}, {errors:,} errors of {samples:,} on "
            f"{header.evaluation['data']}"
        )
    if header.summary:
        entropy, agreement = header.summary["entropy"], header.summary["agreement"]
        drawn = isinstance(header.encoding, Sampled)
        of = "stored draws; the teacher's is higher" if drawn else "soft targets"
        lines["entropy"] = f"{entropy:.3f} nats, mean of the {of}"
        lines["agreement"] = (
            "no labels" if agreement is None else f"{agreement:.2%} {agreement_of(header)}"
        )
        if "confidence" in header.summary:
            lines["confidence"] = (
                f"{header.summary['confidence']:.2%}, mean of the top class at temperature 1"
            )
        if "perplexity" in header.summary:
            lines["perplexity"] = (
                f"{header.summary['perplexity']:,.3f} per token, of the teacher on these"
            )
    lines["software"] = ", ".join(f"{name} {version}" for name, version in header.software.items())
    return "\n".join(f"{title:12} {value}" for title, value in lines.items())


def _row_lines(header: Header) -> dict[str, str]:
    """Lines about the rows of samples that have many; empty for others."""
    facts = header.rows
    if facts is None:
        return {}
    line = f"{header.row_count:,}, {header.row_count / header.samples:,.1f} of a sample"
    if "tokens" in facts:
        share = header.row_count / max(1, facts["tokens"])
        counted = "are predicted" if header.unit == "token" else "have a label"
        line += f"; {share:.1%} of {facts['tokens']:,} tokens {counted}"
    lines = {f"{header.unit}s": line}
    if "tokenizer" in facts:
        template = f", chat template {facts['template']}" if "template" in facts else ""
        lines["tokenizer"] = (
            f"{facts['tokenizer']}, {facts.get('vocabulary', 0):,} tokens{template}"
        )
    return lines


def agreement_of(header: Header) -> str:
    """What the agreement of a cache is a share of, after the number."""
    if header.multi_label:
        return "of all classes of all samples apply as labelled"
    return "have the label as top class"


def _first_names(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def cache_line(cache: Cache) -> str:
    """A finished cache in one line: size, entropy, agreement with the labels, content id."""
    header = cache.header
    summary = header.summary or {}
    agreement = summary.get("agreement")
    top_class = "" if agreement is None else f", top class is the label in {agreement:.2%}"
    if header.multi_label and agreement is not None:
        top_class = f" per class, {agreement:.2%} {agreement_of(header)}"
    rows = "" if header.rows is None else f" of {header.row_count:,} {header.unit}s"
    return (
        f"{cache.path}: {header.samples:,} samples{rows} x {header.views} view(s), {header.classes:,} "
        f"classes, {header.encoding.name}, {header.file_bytes:,} bytes; entropy "
        f"{'of the draws ' * isinstance(header.encoding, Sampled)}{summary.get('entropy', 0.0):.3f} nats"
        f"{top_class}; content id {cache.content_id()}"
    )

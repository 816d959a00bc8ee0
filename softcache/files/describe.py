"""What a cache says of itself, for people and for programs. No torch here: it answers at once."""

from __future__ import annotations

from typing import Any

from softcache.cache import Cache


def facts(cache: Cache) -> dict[str, Any]:
    """The header, and what follows from it and the digests."""
    header = cache.header
    total = header.blocks * (header.views + 1)
    return header.to_json() | {
        "complete": cache.complete,
        "content_id": cache.content_id() if cache.complete else None,
        "coverage": 1 - cache.missing_blocks() / total,
        "bytes_per_sample": header.file_bytes / header.samples,
        "class_names": cache.class_names,
    }


def describe(cache: Cache, name: str | None = None) -> str:
    """The same in a few lines; `name` is what the file is called, if not by its path."""
    header = cache.header
    known = facts(cache)
    lines = {
        "cache": f"{name or cache.path}, format {header.version[0]}.{header.version[1]}",
        "content": known["content_id"] or f"unfinished, {known['coverage']:.1%} of the blocks",
        "samples": f"{header.samples:,} of {header.data}, {header.views:,} view(s), "
        f"augmented by {header.augment or 'nothing'}, seed {header.seed}"
        + (", embedded" if header.embeds_inputs else ""),
        "classes": f"{header.classes:,}: {_first(cache.class_names)}",
        "temperature": f"{header.temperature:g}",
        "encoding": f"{header.encoding.name}, {header.bytes_per_row:,} bytes a row",
        "size": f"{header.file_bytes:,} bytes, {known['bytes_per_sample']:,.1f} per sample",
    }
    for number, teacher in enumerate(header.teachers, 1):
        name = "teacher" if len(header.teachers) == 1 else f"teacher {number}"
        share = f", weight {teacher['weight']:.3g}" if len(header.teachers) > 1 else ""
        weights = f", weights {teacher['weights']}" if teacher.get("weights") else ""
        lines[name] = (
            f"{teacher['name']}, {teacher['parameters']:,} parameters{weights}{share}, in {header.precision}"
        )
    if header.evaluation:
        errors, samples = header.evaluation["errors"], header.evaluation["samples"]
        lines["accuracy"] = (
            f"{1 - errors / samples:.2%}, {errors:,} errors of {samples:,} on "
            f"{header.evaluation['data']}"
        )
    if header.summary:
        entropy, agreement = header.summary["entropy"], header.summary["agreement"]
        lines["entropy"] = f"{entropy:.3f} nats, mean of the soft targets"
        lines["agreement"] = (
            "no labels" if agreement is None else f"{agreement:.2%} have the label as top class"
        )
    lines["software"] = ", ".join(f"{name} {version}" for name, version in header.software.items())
    return "\n".join(f"{name:12} {value}" for name, value in lines.items())


def _first(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def cache_line(cache: Cache) -> str:
    """One line that says what a dump came to."""
    header = cache.header
    summary = header.summary or {}
    agreement = summary.get("agreement")
    agrees = "" if agreement is None else f", top class is the label in {agreement:.2%}"
    return (
        f"{cache.path}: {header.samples:,} samples x {header.views} view(s), {header.classes:,} "
        f"classes, {header.encoding.name}, {header.file_bytes:,} bytes; entropy "
        f"{summary.get('entropy', 0.0):.3f} nats{agrees}; content id {cache.content_id()}"
    )

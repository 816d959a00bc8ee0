"""What the header says of a finished cache's soft targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softcache.cache.reader import Cache

SUMMARY_VALUES = 1 << 27  # how many probabilities are looked at, at the most
CHUNK_VALUES = 1 << 22  # and at once
RUN = 32  # rows side by side: of a file larger than memory, each row apart costs a read of its own


def summary_row_count(cache: Cache) -> int:
    header = cache.header
    count = max(1, min(header.views * header.samples, SUMMARY_VALUES // header.classes))
    return count - count % _run(count)


def _run(count: int) -> int:
    """How many of `count` rows stand side by side; few rows stand alone."""
    return max(1, min(RUN, count // (8 * RUN)))


def summarize(cache: Cache, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Of runs of rows spread evenly through views and samples; `advance` counts rows as they are done.

    entropy: the mean in nats, at the cache's temperature. agreement: the share of labelled rows
    whose top class is the label, None without labels. rows: how many rows were looked at.
    """
    header = cache.header
    total, count = header.views * header.samples, summary_row_count(cache)
    run = _run(count)
    starts = (np.arange(0, count, run) * (total / count)).astype(np.int64)
    rows = (starts[:, None] + np.arange(run)).reshape(-1)
    entropy = agreed = labelled = 0.0
    chunk = max(1, CHUNK_VALUES // header.classes)
    for start in range(0, count, chunk):
        some = rows[start : start + chunk]
        if count < total:
            for array in header.arrays:
                if array.axis == "rows":
                    cache.prefetch_rows(array, some)
        view, sample = np.divmod(some, header.samples)
        for one in np.unique(view):
            samples = sample[view == one]
            log_probs = cache.rows(int(one), samples).astype(np.float64)  # (B, C)
            labels = cache.labels[samples]
            probs = np.exp(log_probs)
            entropy -= float((probs * np.where(probs > 0, log_probs, 0)).sum())
            agreed += int((log_probs.argmax(-1) == labels).sum())
            labelled += int((labels >= 0).sum())
        advance(len(view))
    return {
        "entropy": entropy / count,
        "agreement": agreed / labelled if labelled else None,
        "rows": count,
    }


def pooled_fidelity(parts: Sequence[Cache]) -> dict[str, Any] | None:
    """What the dumps of the parts measured, as one: means by rows, the highest of the rest.

    None if one of them does not say, or the parts were measured at other temperatures.
    """
    known = [(part.header.summary or {}).get("fidelity") for part in parts]
    if not all(known):
        return None
    found: list[dict[str, Any]] = [part for part in known if part]
    try:
        return _pooled(found)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # a header may say anything
        return None


def _pooled(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if any(set(part["at"]) != set(found[0]["at"]) for part in found):
        return None
    weights = np.array([part["rows"] for part in found], np.float64)
    if not weights.sum() > 0:
        return None
    weights /= weights.sum()

    def mean(values: Sequence[float]) -> float:
        return float(weights @ np.array(values, np.float64))

    if not all(np.isfinite(mean([part[name] for part in found])) for name in ("mean", "moved")):
        return None
    return {
        "rows": sum(part["rows"] for part in found),
        "mean": mean([part["mean"] for part in found]),
        "p99": max(part["p99"] for part in found),
        "worst": max(part["worst"] for part in found),
        "at": {t: mean([part["at"][t] for part in found]) for t in found[0]["at"]},
        "moved": mean([part["moved"] for part in found]),
    }

"""The summary of a finished cache, measured on its soft targets and stored in the header."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from softcache.cache.reader import Cache

SUMMARY_VALUES = 1 << 27  # probabilities that a summary decodes, at most
CHUNK_VALUES = 1 << 22  # probabilities decoded at a time
RUN = 32  # adjacent rows: in a file larger than memory, each isolated row costs a separate read


def summary_row_count(cache: Cache) -> int:
    """How many rows summarize() will decode."""
    header = cache.header
    count = max(1, min(header.views * header.samples, SUMMARY_VALUES // header.classes))
    return count - count % _run(count)


def _run(count: int) -> int:
    """The length of the runs of adjacent rows that `count` rows are drawn in; 1 if they are few."""
    return max(1, min(RUN, count // (8 * RUN)))


def summarize(cache: Cache, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Measure a cache on runs of rows that are spread evenly over its views and samples.

    Args:
        advance: called with the number of rows done.

    Returns:
        `entropy`, the mean in nats at the dump temperature; `agreement`, the share of labelled rows
        with their label as the top class, or None without labels; `rows`, how many were decoded.
    """
    header = cache.header
    total, count = header.views * header.samples, summary_row_count(cache)
    run = _run(count)
    starts = (np.arange(0, count, run) * (total / count)).astype(np.int64)
    rows = (starts[:, None] + np.arange(run)).reshape(-1)
    entropy = agreed = labelled = 0.0
    chunk = max(1, CHUNK_VALUES // header.classes)
    for start in range(0, count, chunk):
        chunk_rows = rows[start : start + chunk]
        if count < total:
            for array in header.arrays:
                if array.axis == "rows":
                    cache.prefetch_rows(array, chunk_rows)
        views, cache_rows = np.divmod(chunk_rows, header.samples)
        for view in np.unique(views):
            rows_of_view = cache_rows[views == view]
            log_probs = cache.rows(int(view), rows_of_view).astype(np.float64)  # (B, C)
            labels = cache.labels[rows_of_view]
            probs = np.exp(log_probs)
            entropy -= float((probs * np.where(probs > 0, log_probs, 0)).sum())
            agreed += int((log_probs.argmax(-1) == labels).sum())
            labelled += int((labels >= 0).sum())
        advance(len(chunk_rows))
    return {
        "entropy": entropy / count,
        "agreement": agreed / labelled if labelled else None,
        "rows": count,
    }


def pooled_fidelity(parts: Sequence[Cache]) -> dict[str, Any] | None:
    """The fidelity of several parts together: means weighted by rows, and maxima.

    None if a part has none, or if the parts were measured at different temperatures.
    """
    measured = [(part.header.summary or {}).get("fidelity") for part in parts]
    if not all(measured):
        return None
    fidelities: list[dict[str, Any]] = [fidelity for fidelity in measured if fidelity]
    try:
        return _pool(fidelities)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # a header can contain anything
        return None


def _pool(fidelities: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    first = fidelities[0]
    if any(set(fidelity["at"]) != set(first["at"]) for fidelity in fidelities):
        return None
    weights = np.array([fidelity["rows"] for fidelity in fidelities], np.float64)
    if not weights.sum() > 0:
        return None
    weights /= weights.sum()

    def mean(values: Sequence[float]) -> float:
        return float(weights @ np.array(values, np.float64))

    pooled = {name: mean([f[name] for f in fidelities]) for name in ("mean", "moved")}
    if not all(map(np.isfinite, pooled.values())):
        return None
    return {
        "rows": sum(f["rows"] for f in fidelities),
        "mean": pooled["mean"],
        "p99": max(f["p99"] for f in fidelities),
        "worst": max(f["worst"] for f in fidelities),
        "at": {t: mean([f["at"][t] for f in fidelities]) for t in first["at"]},
        "moved": pooled["moved"],
    }

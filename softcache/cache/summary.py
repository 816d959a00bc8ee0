"""The summary of a finished cache, measured on its soft targets and stored in the header."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.cache.draws import Sampled
from softcache.cache.header import Header
from softcache.cache.reader import Cache
from softcache.cache.verdict import Predictions, judge, judge_entropy

Floats64 = npt.NDArray[np.float64]

SUMMARY_VALUES = 1 << 27  # probabilities that a summary decodes, at most
CHUNK_VALUES = 1 << 22  # probabilities decoded at a time
RUN = 32  # adjacent rows: in a file larger than memory, each isolated row costs a separate read


def summary_row_count(cache: Cache) -> int:
    """How many rows summarize() will decode."""
    header = cache.header
    count = max(1, min(header.views * header.row_count, SUMMARY_VALUES // header.classes))
    return count - count % _run(count)


def _run(count: int) -> int:
    """The length of the runs of adjacent rows that `count` rows are drawn in; 1 if they are few."""
    return max(1, min(RUN, count // (8 * RUN)))


@dataclass(frozen=True)
class RowStatistics:
    """What the rows of a cache come to.

    Attributes:
        rows: how many were decoded.
        entropy: the mean in nats at the dump temperature.
        entropy_at_1: the mean in nats at temperature 1; None if the rows cannot be re-tempered.
        predictions: those of labelled rows whose samples are not mixed, with their confidence at
            temperature 1 (NaN if the rows cannot be re-tempered).
        agreement: share of labelled rows with their label as the top class; None without labels.
        perplexity: of tokens: exp of the mean negative log-probability of the next token at temperature 1.
    """

    rows: int
    entropy: float
    entropy_at_1: float | None
    predictions: Predictions
    agreement: float | None
    perplexity: float | None = None

    @property
    def confidence(self) -> float | None:
        """Mean probability of the top class of labelled rows at temperature 1, if it is known."""
        if not len(self.predictions.labels) or self.entropy_at_1 is None:
            return None
        return self.predictions.mean_confidence

    def summary(self) -> dict[str, Any]:
        """The fields of a header's summary."""
        confidence = self.confidence
        return {
            "entropy": self.entropy,
            "agreement": self.agreement,
            "rows": self.rows,
            **({} if confidence is None else {"confidence": confidence}),
            **({} if self.perplexity is None else {"perplexity": self.perplexity}),
        }


def measure_rows(cache: Cache, advance: Callable[[int], None] = lambda _: None) -> RowStatistics:
    """Measure a cache on runs of rows that are spread evenly over its views and samples.

    Args:
        advance: called with the number of rows done.
    """
    header = cache.header
    if header.multi_label:
        return _measure_multi_label(cache, advance)
    total, count = header.views * header.row_count, summary_row_count(cache)
    run = _run(count)
    starts = (np.arange(0, count, run) * (total / count)).astype(np.int64)
    rows = (starts[:, None] + np.arange(run)).reshape(-1)
    retempers = not isinstance(header.encoding, Sampled) or header.temperature == 1.0
    entropies = [0.0, 0.0]  # at the dump temperature, and at 1
    language = header.unit == "token" and retempers and not isinstance(header.encoding, Sampled)
    loss = 0.0  # of the next tokens, at 1
    labels, classes, confidence = [], [], []
    chunk = max(1, CHUNK_VALUES // header.classes)
    for start in range(0, count, chunk):
        chunk_rows = rows[start : start + chunk]
        if count < total:
            for array in header.arrays:
                if array.axis == "rows":
                    cache.prefetch_rows(array, chunk_rows)
        views, cache_rows = np.divmod(chunk_rows, header.row_count)
        for view in np.unique(views):
            rows_of_view = cache_rows[views == view]
            log_probs = cache.rows(int(view), rows_of_view).astype(np.float64)  # (B, C)
            entropies[0] += _entropy(log_probs)
            classes.append(log_probs.argmax(-1))
            if retempers:
                if header.temperature != 1.0:
                    log_probs *= header.temperature
                    log_probs -= np.logaddexp.reduce(log_probs, -1, keepdims=True)
                entropies[1] += _entropy(log_probs)
            confidence.append(np.exp(log_probs.max(-1)) if retempers else classes[-1] * np.nan)
            labels.append(cache.labels[rows_of_view].astype(np.int64))
            if language:
                known = np.flatnonzero(labels[-1] >= 0)
                loss -= float(log_probs[known, labels[-1][known]].sum())
        advance(len(chunk_rows))
    predictions = Predictions(
        np.concatenate(labels), np.concatenate(classes), np.concatenate(confidence)
    )
    labelled = (predictions.labels >= 0) & (not moves_labels(header))
    judged = labelled if not mixes_samples(header) else np.zeros_like(labelled)
    return RowStatistics(
        rows=count,
        entropy=entropies[0] / count,
        entropy_at_1=entropies[1] / count if retempers else None,
        predictions=predictions.only(judged),
        agreement=predictions.only(labelled).agreement if labelled.any() else None,
        perplexity=perplexity_of(loss, int(labelled.sum())) if language else None,
    )


def perplexity_of(loss: float, tokens: int) -> float | None:
    """The perplexity of tokens with this negative log-likelihood together, in nats; None without any."""
    return math.exp(min(loss / tokens, 700.0)) if tokens else None


def _measure_multi_label(cache: Cache, advance: Callable[[int], None]) -> RowStatistics:
    """The same where each class applies or not on its own.

    Entropy is the mean over the classes, agreement and confidence are those of all decisions, of which each
    says of one class whether it applies.
    """
    header = cache.header
    total, count = header.views * header.samples, summary_row_count(cache)
    rows = (np.arange(count) * (total / count)).astype(np.int64)
    entropies = [0.0, 0.0]
    right = decisions = 0
    labels, classes, confidence = [], [], []
    chunk = max(1, CHUNK_VALUES // header.classes)
    for start in range(0, count, chunk):
        views, cache_rows = np.divmod(rows[start : start + chunk], header.samples)
        for view in np.unique(views):
            rows_of_view = cache_rows[views == view]
            for place, temperature in enumerate((header.temperature, 1.0)):
                odds = cache.rows(int(view), rows_of_view, temperature).astype(np.float64)  # (B, C)
                entropies[place] += float(binary_entropy(odds).mean(-1).sum())
            known = cache.labels[rows_of_view] >= 0
            applies = cache.label_sets(rows_of_view)[known]
            agrees = (odds[known] > 0) == (applies > 0)
            right, decisions = right + int(agrees.sum()), decisions + agrees.size
            # one decision of each row, since there may be very many classes
            picked = np.arange(int(known.sum())), rows_of_view[known] % header.classes
            labels.append(applies[picked].astype(np.int64))
            classes.append((odds[known][picked] > 0).astype(np.int64))
            confidence.append(1 / (1 + np.exp(-np.abs(odds[known][picked]))))
        advance(len(cache_rows))
    judged = 0 if mixes_samples(header) else None
    return RowStatistics(
        rows=count,
        entropy=entropies[0] / count,
        entropy_at_1=entropies[1] / count,
        predictions=Predictions(
            np.concatenate(labels)[:judged],
            np.concatenate(classes)[:judged],
            np.concatenate(confidence)[:judged],
        ),
        agreement=right / decisions if decisions else None,
    )


def binary_entropy(log_odds: Floats64) -> Floats64:
    """The entropy in nats of whether each class applies, of the shape of the log-odds."""
    size = np.abs(log_odds)
    rest = np.exp(-size)  # p of the less likely is rest / (1 + rest)
    entropy: Floats64 = np.log1p(rest) + size * rest / (1 + rest)
    return entropy


def mixes_samples(header: Header) -> bool:
    """Whether samples are mixed in pairs, so that no row has one label."""
    return "mixup" in (header.augment or "").split(",")


def moves_labels(header: Header) -> bool:
    """Whether rows are about other pixels than their labels, which are those of the data itself."""
    return header.unit == "pixel" and header.augment is not None


def warnings_of(
    cache: Cache, statistics: RowStatistics, *, by_row: bool = False, inputs: str | None = None
) -> list[str]:
    """What cannot be right about the rows of a cache, as messages; empty if nothing is wrong.

    Args:
        by_row: whether the rows came as a matrix, which may be in another order than the data.
        inputs: mean and standard deviation of what the teacher got, for messages.
    """
    header = cache.header
    names = [name.decode("utf-8", "replace") for name in cache.arrays["class_names"]]
    if header.multi_label:
        return judge(
            "the teacher, of whether a class applies,",
            statistics.predictions,
            ["does not apply", "applies"],
            repeats=header.views,
            by_row=by_row,
            inputs=inputs,
        )
    found = judge(
        "the teacher",
        statistics.predictions,
        names,
        repeats=header.views,
        by_row=by_row,
        inputs=inputs,
    )
    if statistics.entropy_at_1 is not None:
        found += judge_entropy(
            "the teacher", statistics.entropy_at_1, header.classes, statistics.agreement
        )
    return found


def _entropy(log_probs: Floats64) -> float:
    """The sum over rows of their entropy in nats."""
    probs = np.exp(log_probs)
    return -float((probs * np.where(probs > 0, log_probs, 0)).sum())


def summarize(cache: Cache, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """The fields of a header's summary, and what cannot be right as `warnings`; see measure_rows()."""
    statistics = measure_rows(cache, advance)
    return statistics.summary() | warning_field(warnings_of(cache, statistics))


def warning_field(warnings: Sequence[str]) -> dict[str, Any]:
    """Warnings as a header keeps them; a summary without any has no such field."""
    return {"warnings": list(warnings)} if warnings else {}


def columns_field(parts: Sequence[Cache]) -> dict[str, Any]:
    """What a summary says of the columns of the data, if all parts say the same; else empty."""
    described = [(part.header.summary or {}).get("columns") for part in parts]
    same = all(columns == described[0] for columns in described)
    return {"columns": described[0]} if described[0] and same else {}


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

    optional = (name for name in ("repeats", "unstored") if all(name in f for f in fidelities))
    names = ("mean", "moved", *optional)
    pooled = {name: mean([f[name] for f in fidelities]) for name in names}
    if not all(map(np.isfinite, pooled.values())):
        return None
    return {
        "rows": sum(f["rows"] for f in fidelities),
        "mean": pooled["mean"],
        "p99": max(f["p99"] for f in fidelities),
        "worst": max(f["worst"] for f in fidelities),
        "at": {t: mean([f["at"][t] for f in fidelities]) for t in first["at"]},
        **{name: pooled[name] for name in names[1:]},
    }

"""Figures of a cache: similar classes, certainty, calibration, encodings, views."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.cache import Basis, Cache
from softcache.models.calibration import Calibration
from softcache.results.figures import (
    BLUE,
    COLOURS,
    GREY,
    PALE,
    RED,
    Axes,
    Floats,
    add_legend,
    compact,
    draw,
    log_ticks,
    set_count_axis,
    set_log_axis,
    shorten,
)
from softcache.results.knowledge import Knowledge, Likeness, ViewDivergence

NUMBERED = 12  # classes up to which the map shows numbers
SIDE_BY_SIDE = 20  # classes up to which the map leaves room for the list of pairs
LEAST_KL = 1e-9  # that is drawn; less than this is rounding
FEW_SAMPLES = 10  # in a bin of a reliability diagram, which say little about its accuracy
LABELLED_POINTS = 8  # encodings that are named in their figure


@dataclass(frozen=True)
class EncodingPoint:
    """An encoding that the dump measured: bytes a row, and its largest mean KL over the temperatures."""

    spec: str
    bytes_per_row: int
    kl: float
    chosen: bool


def likeness_limits(means: Floats) -> tuple[float, float]:
    """The range of colours for (K, K) means: that of the values off the diagonal."""
    values = means[~np.eye(len(means), dtype=bool)]
    highest = max(float(values.max(initial=0.0)), 1e-9)
    lowest = float(np.quantile(values, 0.05)) if len(values) else highest
    return min(max(lowest, highest / 1000), highest / 2), highest


def similar_classes(likeness: Likeness, name: Callable[[int], str]) -> bytes:
    """The map of mean soft targets off the diagonal, and the most similar pairs."""
    names = [shorten(name(int(number))) for number in likeness.classes]
    count = len(names)
    height, pairs_height = 4.0, 2.2  # inches
    if count > SIDE_BY_SIDE:
        height = 0.118 * count + 0.065 * max(map(len, names)) + 1.1 + pairs_height

    def paint(figure: Any) -> None:  # noqa: ANN401  # matplotlib's
        if count <= SIDE_BY_SIDE:
            left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
        else:
            ratios = [height - pairs_height, pairs_height]
            left, right = figure.subplots(2, 1, height_ratios=ratios)
        _paint_map(figure, left, likeness.means, names)
        _paint_pairs(right, likeness, name)

    return draw(height, paint)


def _paint_map(figure: Any, axes: Axes, means: Floats, names: Sequence[str]) -> None:  # noqa: ANN401
    import matplotlib
    from matplotlib.colors import LogNorm

    low, high = likeness_limits(means)
    colours = matplotlib.colormaps["YlGnBu"].with_extremes(bad=PALE)
    norm = LogNorm(low, high)
    own = np.eye(len(means), dtype=bool)
    shown = np.ma.masked_array(means.clip(low, high), own)
    image = axes.imshow(shown, norm=norm, cmap=colours, aspect="auto")
    size = 9.0 if len(names) <= SIDE_BY_SIDE else max(5.0, 8.0 - len(names) / 30)
    turned = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(range(len(names)), names, rotation=turned, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("class that the teacher sees")
    axes.set_ylabel("class of the sample")
    if len(names) <= NUMBERED:
        for (row, column), value in np.ndenumerate(means):
            dark = row != column and norm(min(max(value, low), high)) > 0.6
            colour = "white" if dark else "#999999" if row == column else "#222222"
            text = f"{100 * value:.1f}" if value >= 0.0095 else f"{100 * value:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.015, aspect=30)
    ticks = log_ticks(low, high, 5)
    bar.set_ticks(ticks, labels=[_percent_tick(tick) for tick in ticks])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("mean probability")


def _percent_tick(share: float) -> str:
    return f"{compact(100 * share)}%"


def _paint_pairs(axes: Axes, likeness: Likeness, name: Callable[[int], str]) -> None:
    pairs = likeness.pairs
    places = range(len(pairs))
    shares = [100 * pair.probability for pair in pairs]
    axes.barh(places, shares, color=BLUE, height=0.62)
    labels = [f"{shorten(name(p.own))} → {shorten(name(p.other))}" for p in pairs]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    for place, share in zip(places, shares, strict=True):
        axes.annotate(f"{share:.3g}%", (share, place), (4, 0), textcoords="offset points",
                      va="center", fontsize=8, color="#222222")  # fmt: skip
    axes.set_xlim(0, max(shares, default=1.0) * 1.22)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("most similar: class → looks like", fontsize=9, loc="left")


def certainty(knowledge: Knowledge, temperature: float, classes: int) -> bytes:
    """Histograms of the entropy and of the largest probability of soft targets."""
    uniform = math.log(classes)
    bins, edges = 40, np.linspace(0, 1, 41)

    def paint(figure: Any) -> None:  # noqa: ANN401
        left, right = figure.subplots(1, 2)
        entropy = knowledge.entropy.clip(0, uniform)
        counts, _, _ = left.hist(entropy, bins=bins, range=(0, uniform), color=BLUE)
        mean = float(knowledge.entropy.mean())
        line = left.axvline(mean, color=RED)
        left.set_xlim(0, uniform)
        left.set_xlabel(f"entropy at T = {temperature:g}, nats (uniform: {uniform:.2f})")
        set_count_axis(left, counts.max())
        counts, _, bars = right.hist(knowledge.top.clip(0, 1), bins=edges, color=BLUE)
        highest = counts.max()
        entries = [(line, f"mean entropy {mean:.3f}"), (bars, f"at T = {temperature:g}")]
        if knowledge.top_at_one is not None and temperature != 1:
            counts, _, outline = right.hist(
                knowledge.top_at_one.clip(0, 1), bins=edges, histtype="step", color=GREY, lw=1.2
            )
            highest = max(highest, counts.max())
            entries.append((outline[0], "at T = 1"))
        right.set_xlim(0, 1)
        right.set_xlabel("largest probability of a sample")
        set_count_axis(right, highest)
        add_legend(figure, entries)

    return draw(2.7, paint)


def reliability(calibrations: Mapping[str, Calibration]) -> bytes:
    """Accuracy by confidence, with a panel for each temperature."""

    def paint(figure: Any) -> None:  # noqa: ANN401
        panels = figure.subplots(1, len(calibrations), squeeze=False, sharey=True)[0]
        entries: list[tuple[Any, str]] = []
        for axes, (name, calibration) in zip(panels, calibrations.items(), strict=True):
            filled = calibration.samples > 0
            samples = calibration.samples[filled]
            confidence, accuracy = calibration.confidence[filled], calibration.accuracy[filled]
            # the standard error of a share, which is not 0 even if all samples agree
            smoothed = (accuracy * samples + 1) / (samples + 2)
            error = np.sqrt(smoothed * (1 - smoothed) / samples)
            many = samples >= FEW_SAMPLES
            (ideal,) = axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
            bars = np.stack([np.minimum(error, accuracy), np.minimum(error, 1 - accuracy)])
            axes.errorbar(confidence, accuracy, bars, fmt="none", ecolor="#b9d0e2", elinewidth=1.2)
            (line,) = axes.plot(confidence[many], accuracy[many], "-o", color=BLUE, lw=1, ms=5)
            (few,) = axes.plot(confidence[~many], accuracy[~many], "o", mfc="white", mec=BLUE, ms=4)
            axes.set_title(f"{name}: ECE {calibration.error:.4f}", fontsize=9)
            axes.set_xlabel("confidence")
            axes.set_xlim(-0.03, 1.03)
            axes.set_ylim(-0.03, 1.03)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
            entries = [
                (line, "accuracy ± standard error"),
                (few, f"fewer than {FEW_SAMPLES} samples"),
                (ideal, "as sure as right"),
            ]
        panels[0].set_ylabel("accuracy")
        add_legend(figure, entries)

    return draw(2.8, paint)


def encoding_points(cache: Cache) -> list[EncodingPoint]:
    """The encodings that the dump measured, in ascending size; the chosen one is marked.

    Whatever does not look like one of them is left out: a header can contain anything there.
    """
    header = cache.header
    candidates = (header.choice or {}).get("candidates")
    found = []
    for candidate in candidates if isinstance(candidates, list) else []:
        if not isinstance(candidate, dict):
            continue
        spec, size, kl = (candidate.get(key) for key in ("encoding", "bytes_per_row", "kl"))
        values = list(kl.values()) if isinstance(kl, dict) else []
        numeric = all(type(v) in (int, float) and math.isfinite(v) for v in values)
        if not (isinstance(spec, str) and type(size) is int and size > 0 and values and numeric):
            continue
        family, _, sizes = spec.partition(":")
        chosen = family == header.encoding.name and size == header.bytes_per_row
        if isinstance(header.encoding, Basis):
            chosen = chosen and sizes.rpartition(",")[2] == str(header.encoding.top)
        found.append(EncodingPoint(spec, size, max(0.0, *map(float, values)), chosen))
    return sorted(found, key=lambda point: (point.bytes_per_row, point.kl))


def encodings(points: Sequence[EncodingPoint], max_kl: float | None) -> bytes:
    """Bytes a row against KL for every encoding that was measured."""
    families = list(dict.fromkeys(point.spec.partition(":")[0] for point in points))
    kl = {point.spec: max(point.kl, LEAST_KL) for point in points}

    def paint(figure: Any) -> None:  # noqa: ANN401
        axes = figure.subplots()
        entries = []
        for number, family in enumerate(families):
            members = [p for p in points if p.spec.partition(":")[0] == family]
            (line,) = axes.plot(
                [p.bytes_per_row for p in members], [kl[p.spec] for p in members],
                "o", color=COLOURS[number % len(COLOURS)], ms=5,
            )  # fmt: skip
            entries.append((line, family))
        chosen = [point for point in points if point.chosen]
        if chosen:
            (ring,) = axes.plot(
                [p.bytes_per_row for p in chosen], [kl[p.spec] for p in chosen],
                "o", ms=12, mfc="none", mec="#111111", mew=1.5,
            )  # fmt: skip
            entries.append((ring, "chosen"))
        heights = list(kl.values())
        if max_kl is not None and max_kl > 0:
            limit = axes.axhline(max_kl, color=GREY, lw=1, ls="--")
            entries.append((limit, f"largest KL allowed, {compact(max_kl)}"))
            heights.append(max_kl)
        set_log_axis(axes, "x", [p.bytes_per_row for p in points])
        set_log_axis(axes, "y", heights)
        axes.set_xlabel("bytes a row")
        axes.set_ylabel("largest mean KL, nats")
        add_legend(figure, entries)
        figure.draw_without_rendering()  # from now on, the axes know where they are
        _name_points(axes, points, kl)

    return draw(3.3, paint)


def _name_points(axes: Axes, points: Sequence[EncodingPoint], kl: Mapping[str, float]) -> None:
    """Name the chosen encoding and the Pareto-optimal ones, where their names do not overlap."""
    best = [
        p for p in points
        if not any(q.bytes_per_row <= p.bytes_per_row and kl[q.spec] < kl[p.spec] for q in points)
    ]  # fmt: skip
    place = axes.transData.transform
    taken = [place((p.bytes_per_row, kl[p.spec])) for p in points]
    boxes: list[tuple[float, float, float, float]] = [
        (x - 4, y - 4, x + 4, y + 4) for x, y in taken
    ]
    for point in sorted(best, key=lambda p: not p.chosen)[:LABELLED_POINTS]:
        x, y = place((point.bytes_per_row, kl[point.spec]))
        width, height = (5.9 if point.chosen else 5.2) * len(point.spec), 11.0
        (left_end, _), (right_end, _) = axes.transAxes.transform([(0, 0), (1, 1)])
        for side, rise in ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1)):
            gap = 9 if point.chosen else 6
            left = x + gap if side > 0 else x - gap - width
            bottom = y - height / 2 + rise * 9
            box = (left, bottom, left + width, bottom + height)
            if (
                box[0] < left_end
                or box[2] > right_end
                or any(_overlap(box, other) for other in boxes)
            ):
                continue
            boxes.append(box)
            axes.annotate(
                point.spec, (point.bytes_per_row, kl[point.spec]), (side * gap, rise * 9),
                textcoords="offset points", ha="left" if side > 0 else "right", va="center",
                fontsize=8, fontweight="bold" if point.chosen else "normal",
            )  # fmt: skip
            break


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    """Whether two boxes (left, bottom, right, top) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def view_divergence(views: ViewDivergence) -> bytes:
    """How the soft targets of one sample differ, as more of its views are compared."""
    counts = np.arange(1, len(views.divergence) + 1)
    ticks = sorted(
        {round(tick) for tick in np.linspace(1, len(counts), min(8, len(counts))).tolist()}
    )

    def paint(figure: Any) -> None:  # noqa: ANN401
        left, right = figure.subplots(1, 2)
        left.plot(counts, views.divergence, "-o", color=BLUE, ms=4)
        left.set_ylabel("KL to the sample's mean, nats")
        right.plot(counts, 100 * views.changed, "-o", color=BLUE, ms=4)
        right.set_ylabel("top class changes, %")
        for axes in (left, right):
            axes.set_xlabel("views compared")
            axes.set_xticks(ticks)
            axes.set_ylim(bottom=0)

    return draw(2.6, paint)

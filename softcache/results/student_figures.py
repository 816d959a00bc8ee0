"""Figures of students: learning curves, accuracy against cost, similarity of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcache.results.figures import (
    BLUE,
    GREY,
    RED,
    add_legend,
    colour_of,
    draw,
    legend_height,
    marker_of,
    set_log_axis,
    set_value_axis,
    shorten,
)
from softcache.results.students import Curve, Spread, Student, error_curve, loss_curve

QUANTILES = (0.1, 0.9)  # of the times of single runs, that the error bars of a latency span


@dataclass(frozen=True)
class CostPoint:
    """A student in the figure of accuracy against cost.

    Attributes:
        label: what the legend calls it.
        hard: whether it was trained on hard labels alone.
        accuracy: in percent, over the seeds.
        parameters: number of parameters.
        milliseconds: median, 10th and 90th percentile of the time for one sample.
        pair: number of the student that it is, or that it is the baseline of.
    """

    label: str
    hard: bool
    accuracy: Spread
    parameters: int
    milliseconds: tuple[float, float, float]
    pair: int


@dataclass(frozen=True)
class TeacherPoint:
    """The teacher in the same figure; its accuracy in percent, on the same data."""

    accuracy: float
    parameters: int


def cost_points(students: Sequence[Student]) -> list[CostPoint]:
    """One point for each student whose accuracy is known, over all its seeds."""
    points, pairs = [], pair_numbers(students)
    for student in students:
        values = [100 * value for value in student.accuracy_by_seed().values()]
        if not values:
            continue
        low, median, high = (
            1e3 * float(t) for t in np.quantile(student.seconds, (QUANTILES[0], 0.5, QUANTILES[1]))
        )
        points.append(
            CostPoint(
                student.label, student.hard, Spread.of(values), student.parameters,
                (median, low, high), pairs[id(student)],
            )
        )  # fmt: skip
    return points


def pair_numbers(students: Sequence[Student]) -> dict[int, int]:
    """A number for each student by id(); a baseline has that of the first student it belongs to."""
    numbers: dict[int, int] = {}
    for student in students:
        if id(student) not in numbers:
            numbers[id(student)] = len(set(numbers.values()))
        if student.baseline is not None:
            numbers.setdefault(id(student.baseline), numbers[id(student)])
    return numbers


def curves(students: Sequence[Student]) -> bytes:
    """Training loss and test error by epoch: the mean over the seeds, and a band from lowest to highest."""
    pairs = pair_numbers(students)
    drawn = [[loss_curve(s) for s in students], [error_curve(s) for s in students]]
    counted = any(curve.epochs for curve in drawn[1])
    labels = [student.label for student in students]

    def paint(figure: Any) -> None:  # noqa: ANN401  # matplotlib's
        panels = figure.subplots(1, 2 if counted else 1, squeeze=False)[0]
        entries: dict[str, Any] = {}
        for axes, lines in zip(panels, drawn, strict=False):
            for student, curve in zip(students, lines, strict=True):
                number = pairs[id(student)]
                colour = colour_of(number)
                marker = marker_of(number) if len(curve.epochs) < 12 else ""
                (line,) = axes.plot(
                    curve.epochs, curve.mean, color=colour, ls="--" if student.hard else "-",
                    marker=marker, ms=4, lw=1.5, mfc="white" if student.hard else colour,
                )  # fmt: skip
                entries.setdefault(student.label, line)
                if len(student.runs) > 1:
                    axes.fill_between(
                        curve.epochs, curve.low, curve.high, color=colour, alpha=0.15, lw=0
                    )
            _set_curve_axes(axes, lines)
        panels[0].set_ylabel("training loss")
        if counted:
            panels[1].set_ylabel("test error, %")
        add_legend(figure, [(line, label) for label, line in entries.items()])

    return draw(2.6 + legend_height(labels), paint)


def _set_curve_axes(axes: Any, lines: Sequence[Curve]) -> None:  # noqa: ANN401
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    set_value_axis(axes, [value for curve in lines for value in (*curve.low, *curve.high)])


def accuracy_against_cost(points: Sequence[CostPoint], teacher: TeacherPoint | None) -> bytes:
    """Accuracy against parameters and latency, each student over all its seeds."""
    labels = [point.label for point in points] + (["teacher"] if teacher else [])

    def paint(figure: Any) -> None:  # noqa: ANN401
        size_axes, time_axes = figure.subplots(1, 2, sharey=True)
        shown_sizes = _side_by_side(points)
        entries: list[tuple[Any, str]] = []
        for point in points:
            colour = colour_of(point.pair)
            style = {
                "fmt": marker_of(point.pair), "color": colour, "ms": 6, "elinewidth": 1.2, "capsize": 2.5,
                "mfc": "white" if point.hard else colour, "zorder": 3,
            }  # fmt: skip
            accuracy = point.accuracy
            spread = [[accuracy.mean - accuracy.low], [accuracy.high - accuracy.mean]]
            median, low, high = point.milliseconds
            handle = size_axes.errorbar(shown_sizes[point.label], accuracy.mean, spread, **style)
            time_axes.errorbar(
                median, accuracy.mean, spread, [[median - low], [high - median]], **style
            )
            entries.append((handle, point.label))
        sizes = [float(point.parameters) for point in points]
        if teacher is not None:
            if teacher.parameters:
                star = size_axes.plot(teacher.parameters, teacher.accuracy, "*", color=GREY, ms=11)
                sizes.append(float(teacher.parameters))
            for axes in (size_axes, time_axes):
                line = axes.axhline(teacher.accuracy, color=GREY, ls=":", lw=1.2)
            entries.append((star[0] if teacher.parameters else line, "teacher"))
        set_log_axis(size_axes, "x", [*shown_sizes.values(), *(max(1.0, size) for size in sizes)])
        times = [time for point in points for time in point.milliseconds]
        set_log_axis(time_axes, "x", [max(1e-6, time) for time in times])
        size_axes.set_xlabel("parameters")
        time_axes.set_xlabel("ms for one sample on the CPU")
        size_axes.set_ylabel("accuracy, %")
        add_legend(figure, entries)

    return draw(2.6 + legend_height(labels), paint)


def _side_by_side(points: Sequence[CostPoint]) -> dict[str, float]:
    """Where to draw each point: those of the same size stand next to each other, not on each other."""
    sizes = [max(1, point.parameters) for point in points]
    step = max(3.0, max(sizes) / min(sizes)) ** 0.022  # of a logarithmic axis
    places = {}
    for size in dict.fromkeys(sizes):
        members = [point for point in points if max(1, point.parameters) == size]
        for number, point in enumerate(members):
            places[point.label] = size * step ** (number - (len(members) - 1) / 2)
    return places


def gradients(similarity: Mapping[str, Mapping[str, float]]) -> bytes:
    """Mean cosine between the gradients of batches, by student: soft targets and hard labels."""
    labels = list(similarity)
    kinds = {"soft": ("soft targets", BLUE, "o"), "hard": ("hard labels", RED, "s")}

    def paint(figure: Any) -> None:  # noqa: ANN401
        axes = figure.subplots()
        entries: dict[str, Any] = {}
        for place, label in enumerate(labels):
            values = similarity[label]
            if len(values) > 1:
                axes.plot(list(values.values()), [place, place], color="#cfcfcf", lw=2, zorder=1)
            for kind, value in values.items():
                name, colour, marker = kinds[kind]
                (handle,) = axes.plot(value, place, marker, color=colour, ms=6)
                entries.setdefault(name, handle)
        axes.set_yticks(range(len(labels)), [shorten(label, 40) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("mean cosine between the gradients of two batches of 64")
        add_legend(figure, [(handle, name) for name, handle in entries.items()])

    return draw(1.2 + 0.26 * len(labels), paint)

"""What figures show: ticks, limits, names as they are, the encodings that were measured."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.results import cache_figures, figures, student_figures
from softcache.results.cache_figures import EncodingPoint, encoding_points, likeness_limits
from softcache.results.figures import compact, legend_rows, log_ticks, shorten
from softcache.results.knowledge import Likeness, Pair
from softcache.results.student_figures import CostPoint, TeacherPoint
from softcache.results.students import Spread
from tests.configs import replace

NAMES = ["$x_1$ and $y$", "costs $5", r"$\frac{1}{", "<b>&", "_private", "plain"]


def texts(svg: bytes) -> list[str]:
    """The texts of an SVG, as they are in the file."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def similar(names: list[str]) -> bytes:
    """The figure of similar classes with these names."""
    count = len(names)
    means = np.full((count, count), 0.02) + 0.9 * np.eye(count)
    pairs = [Pair(0, 1, 0.05), Pair(2, 3, 0.03)]
    likeness = Likeness(np.arange(count), means, pairs, all_classes=True)
    return cache_figures.similar_classes(likeness, names.__getitem__)


# names


def test_names_are_drawn_as_they_are() -> None:
    drawn = texts(similar(NAMES))
    for name in ("$x_1$ and $y$", "costs $5", r"$\frac{1}{", "&lt;b&gt;&amp;", "_private"):
        assert drawn.count(name) == 2, name  # on both axes
    assert "$x_1$ and $y$ → costs $5" in drawn


def test_mathtext_would_change_or_refuse_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures.STYLE, "text.parse_math", True)
    assert "$x_1$ and $y$" not in texts(similar(["$x_1$ and $y$", "a", "b", "c"]))
    with pytest.raises(ValueError, match=r"ParseException|Expected"):
        similar([r"$\frac{1}{$", "a", "b", "c"])


def test_a_legend_has_every_name() -> None:
    points = [
        CostPoint(name, number % 2 == 1, Spread.of([90.0 + number]), 1000, (1.0, 0.9, 1.2), number)
        for number, name in enumerate(NAMES)
    ]
    drawn = [text.strip() for text in texts(student_figures.accuracy_against_cost(points, None))]
    for name in ("$x_1$ and $y$", "costs $5", r"$\frac{1}{", "_private", "plain"):
        assert name in drawn, name


def test_long_names_are_cut() -> None:
    assert shorten("short") == "short"
    assert len(shorten("a" * 100)) == figures.LABEL_WIDTH
    assert shorten("a" * 100).endswith("a…")
    assert len(shorten("金" * 100)) <= figures.LABEL_WIDTH / 2 + 1


# axes


def test_ticks_are_few_and_lie_in_the_axis() -> None:
    random = np.random.default_rng(0)
    for low, ratio in zip(
        10 ** random.uniform(-9, 9, 500), 2 ** random.uniform(1, 40, 500), strict=True
    ):
        ticks = log_ticks(low, low * ratio)
        assert 2 <= len(ticks) <= 6, (low, ratio)
        assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)
        labels = [compact(tick) for tick in ticks]
        assert len(set(labels)) == len(labels), labels
        assert max(map(len, labels)) <= 8


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "0"),
        (12_000, "12k"),
        (2e6, "2M"),
        (0.015, "0.015"),
        (1e-5, "10⁻⁵"),
        (1.5e-5, "1.5·10⁻⁵"),
        (3e-5, "3·10⁻⁵"),
        (5, "5"),
    ],
)
def test_labels_of_ticks(value: float, label: str) -> None:
    assert compact(value) == label


def test_a_legend_fits_the_page() -> None:
    assert legend_rows(["a"] * 3) == (3, 1)
    assert legend_rows(["a"] * 5) == (3, 2)
    assert legend_rows(["a" * 60] * 5) == (1, 5)


def test_students_of_one_size_stand_side_by_side() -> None:
    spread = Spread.of([90.0])
    points = [
        CostPoint(name, False, spread, size, (1.0, 1.0, 1.0), 0)
        for name, size in (("a", 1000), ("b", 1000), ("c", 90_000))
    ]
    places = student_figures._side_by_side(points)
    assert places["a"] < 1000 < places["b"]
    assert places["c"] == 90_000


def test_the_teacher_is_in_the_figure_and_its_size_on_the_axis() -> None:
    points = [CostPoint("small", False, Spread.of([90.0]), 1000, (1.0, 0.9, 1.2), 0)]
    with_teacher = texts(
        student_figures.accuracy_against_cost(points, TeacherPoint(99.0, 90_000_000))
    )
    assert "teacher" in with_teacher
    assert "10M" in with_teacher
    without = texts(student_figures.accuracy_against_cost(points, None))
    assert "teacher" not in without
    assert "10M" not in without


# colours


def test_colours_span_the_values_off_the_diagonal() -> None:
    random = np.random.default_rng(0)
    means = random.uniform(0.004, 0.05, (10, 10))
    np.fill_diagonal(means, 0.9)
    low, high = likeness_limits(means)
    off = means[~np.eye(10, dtype=bool)]
    assert high == off.max()
    assert off.min() <= low < np.median(off)
    np.fill_diagonal(means, 1e-9)
    assert likeness_limits(means) == (low, high)
    means[0, 1] = 0.2
    assert likeness_limits(means)[1] == 0.2


def test_colours_have_a_range_even_if_all_values_are_the_same() -> None:
    low, high = likeness_limits(np.full((3, 3), 0.25))
    assert 0 < low < high == 0.25
    low, high = likeness_limits(np.eye(3))
    assert 0 < low < high


# encodings


def test_encodings_that_were_measured(dump_config: DumpConfig) -> None:
    cache = dump(replace(dump_config, encoding="auto"))
    found = encoding_points(cache)
    (chosen,) = [point for point in found if point.chosen]
    assert chosen.bytes_per_row == cache.header.bytes_per_row
    assert chosen.spec == cache.header.encoding.name
    assert cache.header.choice is not None
    listed = {c["encoding"]: c for c in cache.header.choice["candidates"]}
    assert {point.spec for point in found} == set(listed)
    for point in found:
        assert point.kl == max(0.0, *listed[point.spec]["kl"].values())
    drawn = texts(cache_figures.encodings(found, 1e-3))
    assert chosen.spec in drawn
    assert "largest KL allowed, 0.001" in drawn


def test_a_cache_with_a_given_encoding_has_none_to_compare(cache: Cache) -> None:
    assert encoding_points(cache) == []


def test_whatever_is_not_an_encoding_is_left_out(cache: Cache) -> None:
    good = {"encoding": "dense", "bytes_per_row": 10, "kl": {"4": 1e-8, "1": 2e-8}}
    bad: list[object] = [
        None, "dense", {}, good | {"encoding": 3}, good | {"bytes_per_row": "10"},
        good | {"bytes_per_row": 0}, good | {"kl": {}}, good | {"kl": {"4": "low"}},
        good | {"kl": {"4": float("nan")}}, good | {"kl": [1.0]},
    ]  # fmt: skip
    choice = {"asked": "auto", "candidates": [*bad, good]}
    forged = replace(cache, header=replace(cache.header, choice=choice))
    assert encoding_points(forged) == [EncodingPoint("dense", 10, 2e-8, chosen=True)]
    for candidates in (7, "dense", {"dense": good}, None):
        forged = replace(
            cache, header=replace(cache.header, choice={"asked": "auto", "candidates": candidates})
        )
        assert encoding_points(forged) == []


def test_names_of_encodings_do_not_overlap() -> None:
    points = [
        EncodingPoint(f"basis:{size},8", size, 10.0 ** (-size / 20), chosen=size == 64)
        for size in range(40, 100, 2)
    ]
    drawn = texts(cache_figures.encodings(points, None))
    named = [text for text in drawn if text.startswith("basis:")]
    assert "basis:64,8" in named
    assert len(named) <= cache_figures.LABELLED_POINTS


# pictures


def test_a_figure_is_a_uri_of_itself() -> None:
    uri = figures.as_uri(b"<svg/>")
    assert base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")) == b"<svg/>"


def test_thumbnails_are_made_of_images_only() -> None:
    random = np.random.default_rng(0)
    for shape in ((1, 8, 8), (8, 8), (3, 8, 8)):
        assert figures.thumbnail(random.integers(0, 256, shape, dtype=np.uint8))
        assert figures.thumbnail(random.random(shape).astype(np.float32))
    for other in (random.random(64), random.random((5, 8, 8)), random.normal(size=(8, 8))):
        assert figures.thumbnail(other) is None

"""How a report draws: SVG figures as wide as the page, with axes and legends that stay readable."""

from __future__ import annotations

import base64
import io
import math
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.util.extras import import_extra

WIDTH = 8.0  # inches, of every figure, so that all have the same size of text

BLUE, RED, GREY, PALE = "#1b6ca8", "#d1495b", "#4d4d4d", "#dcdcdc"
COLOURS = (BLUE, RED, "#2a9d6f", "#8a5fbf", "#c98b1b", "#2fa3b5", "#b0479a", "#6b7a1f")
MARKERS = ("o", "s", "^", "D")  # one for each round of the colours

LABEL_WIDTH = 24  # characters of a class name
LEGEND_WIDTH = 105  # characters side by side in a legend

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # names come from files, and a name may have two dollar signs
    "svg.hashsalt": "softcache",  # so that the same report has the same bytes
    "svg.fonttype": "none",  # the browser knows more scripts than the fonts of matplotlib
}

Axes = Any  # of matplotlib, which comes without types
Floats = npt.NDArray[np.float64]


def draw(height: float, paint: Callable[[Any], None]) -> bytes:
    """The SVG that `paint` draws on a figure of WIDTH and `height` in inches."""
    matplotlib = import_extra("matplotlib", extra="report", what="softcache report")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # see svg.fonttype
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def as_uri(image: bytes, kind: str = "svg+xml") -> str:
    """A picture as a URI that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def colour_of(number: int) -> str:
    """The colour of a student by its number."""
    return COLOURS[number % len(COLOURS)]


def marker_of(number: int) -> str:
    """The marker of a student by its number."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def shorten(text: str, width: int = LABEL_WIDTH) -> str:
    """Text of at most `width` columns; characters of East Asian scripts take two each."""
    columns = 0
    for position, character in enumerate(text):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > width:
            return f"{text[: max(1, position - 1)].rstrip()}…"
    return text


def compact(value: float) -> str:
    """The label of a tick: 12000 is 12k, and 0.0001 is 10⁻⁴."""
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    if abs(value) >= 9.99e-4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".replace(".0e", "e").split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def log_ticks(low: float, high: float, limit: int = 6) -> list[float]:
    """Round values for a logarithmic axis from `low` to `high`, which is at least twice as much.

    There are at least two of them, and at most `limit`.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in multiples]
        ticks = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
        if len(ticks) <= limit:
            break
    else:
        step = math.ceil(len(ticks) / limit)
        ticks = ticks[::-1][::step][::-1]
    return ticks


def set_log_axis(axes: Axes, which: str, values: Sequence[float], least_ratio: float = 3.0) -> None:
    """A logarithmic axis that spans `values`, and at least `least_ratio` from end to end."""
    low, high = min(values), max(values)
    margin = max(1.15, (high / low) ** 0.07, math.sqrt(max(1.0, least_ratio * low / high)))
    low, high = low / margin, high * margin
    ticks = log_ticks(low, high)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    getattr(axes, f"set_{which}ticks")(ticks, [compact(tick) for tick in ticks])
    getattr(axes, f"{which}axis").minorticks_off()


def set_value_axis(axes: Axes, values: Sequence[float]) -> None:
    """A vertical axis for positive values: logarithmic only if they span more than a factor of 5."""
    if values and min(values) > 0 and max(values) > 5 * min(values):
        set_log_axis(axes, "y", values)


def set_count_axis(axes: Axes, highest: float) -> None:
    """A logarithmic vertical axis for counts from 1."""
    set_log_axis(axes, "y", [1.0, max(2.0, highest)])
    axes.set_ylim(bottom=0.7)
    axes.set_ylabel("samples")


def legend_rows(labels: Sequence[str]) -> tuple[int, int]:
    """How many columns and rows a legend of these labels has."""
    widest = max((len(label) for label in labels), default=1) + 6
    rows = math.ceil(len(labels) / max(1, min(LEGEND_WIDTH // widest, 4)))
    return math.ceil(len(labels) / max(1, rows)), rows


def add_legend(figure: Any, entries: Sequence[tuple[Any, str]]) -> None:  # noqa: ANN401
    """A legend below the axes, where it hides nothing."""
    labels = [shorten(label, LEGEND_WIDTH - 6) for _, label in entries]
    columns, _ = legend_rows(labels)
    # matplotlib leaves out labels that begin with an underscore
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    handles = [handle for handle, _ in entries]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def legend_height(labels: Sequence[str]) -> float:
    """Inches that a legend of these labels takes."""
    return 0.2 * legend_rows(labels)[1] + 0.1


def thumbnail(image: npt.NDArray[Any]) -> bytes | None:
    """A PNG of an image (1 or 3, H, W) or (H, W), uint8 or float in [0, 1]; None if it is not an image."""
    if image.ndim == 3 and image.shape[0] == 1:
        image = image[0]
    elif image.ndim == 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        return None
    if min(image.shape[:2]) < 4:
        return None
    if image.dtype != np.uint8:
        if image.dtype.kind != "f" or image.min() < 0 or image.max() > 1:
            return None
        image = (255 * image).round().astype(np.uint8)
    pillow = import_extra("PIL.Image", extra="report", what="softcache report")
    out = io.BytesIO()
    pillow.fromarray(image).save(out, format="png")
    return out.getvalue()

"""Figures of a report, each as the bytes of an SVG (matplotlib, of the extra softcache[report])."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from softcache.results.metrics import Calibration
from softcache.util.extras import import_extra

Floats = npt.NDArray[np.float64]

COLOURS = ("#1b6ca8", "#d1495b", "#2a9d6f", "#8a5fbf", "#c98b1b", "#4d4d4d")

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "softcache",  # the same report gives the same bytes
    "svg.fonttype": "none",
}


def draw(size: tuple[float, float], paint: Callable[[Any], None]) -> bytes:
    """What `paint` draws on a figure of `size` inches."""
    matplotlib = import_extra("matplotlib", extra="report", what="softcache report")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def as_uri(image: bytes, kind: str = "svg+xml") -> str:
    """A picture that needs no file of its own."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def heat_map(means: Floats, names: Sequence[str]) -> bytes:
    """Mean soft targets (C, C): a row for each class of the sample, a column for each of the target."""

    def paint(figure: Any) -> None:  # noqa: ANN401  # matplotlib's
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        shown = axes.imshow(np.maximum(means, 1e-5), norm=LogNorm(1e-5, 1), cmap="viridis")
        figure.colorbar(shown, ax=axes, label="mean probability")
        if len(names) <= 50:
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("what the teacher sees in it")
        axes.set_ylabel("class of the sample")
        axes.spines[:].set_visible(False)

    side = 5.0 if len(names) <= 20 else 7.0
    return draw((side + 0.6, side), paint)


def histograms(entropy: Floats, top: Floats, most: float) -> bytes:
    """Of entropies (N,) in nats, up to `most`, and of the largest probabilities (N,)."""

    def paint(figure: Any) -> None:  # noqa: ANN401
        left, right = figure.subplots(1, 2)
        left.hist(entropy, bins=40, range=(0, most), color=COLOURS[0])
        left.axvline(float(entropy.mean()), color=COLOURS[1], label=f"mean {entropy.mean():.3f}")
        left.set_xlabel("entropy of a soft target, nats")
        left.legend(frameon=False)
        right.hist(top, bins=40, range=(0, 1), color=COLOURS[0])
        right.set_xlabel("largest probability")
        for axes in (left, right):
            axes.set_ylabel("samples")
            axes.set_yscale("symlog")

    return draw((8.0, 2.8), paint)


def reliability(found: Mapping[str, Calibration]) -> bytes:
    """Accuracy by confidence, a panel for each temperature."""

    def paint(figure: Any) -> None:  # noqa: ANN401
        panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
        for axes, (name, one) in zip(panels, found.items(), strict=True):
            edges = np.linspace(0, 1, len(one.samples) + 1)
            there = one.samples > 0
            axes.bar(
                edges[:-1][there], one.accuracy[there], np.diff(edges)[there], align="edge",
                color=COLOURS[0], edgecolor="white", label="accuracy",
            )  # fmt: skip
            axes.plot(one.confidence[there], one.confidence[there], "o", ms=3, color=COLOURS[1])
            axes.plot([0, 1], [0, 1], color=COLOURS[1], lw=1, label="confidence")
            axes.set_title(f"{name}: error {one.error:.4f}", fontsize=9)
            axes.set_xlabel("confidence")
        panels[0].set_ylabel("accuracy")
        panels[0].legend(frameon=False)

    return draw((2.8 * len(found), 2.8), paint)


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Losses, and errors where they were counted, by epoch."""

    def paint(figure: Any) -> None:  # noqa: ANN401
        counted = any("errors" in line for lines in runs.values() for line in lines)
        panels = figure.subplots(1, 2 if counted else 1, squeeze=False)[0]
        for number, (name, lines) in enumerate(runs.items()):
            colour = COLOURS[number % len(COLOURS)]
            epochs = [line["epoch"] for line in lines]
            panels[0].plot(epochs, [line["total"] for line in lines], color=colour, label=name)
            with_errors = [line for line in lines if "errors" in line]
            if with_errors:
                panels[1].plot(
                    [line["epoch"] for line in with_errors],
                    [100 * line["errors"] / line["samples"] for line in with_errors],
                    color=colour,
                    label=name,
                )
        panels[0].set_ylabel("training loss")
        panels[0].set_yscale("log")
        if counted:
            panels[1].set_ylabel("test error, %")
            panels[1].set_yscale("log")
        for axes in panels:
            axes.set_xlabel("epoch")
        panels[-1].legend(frameon=False, fontsize=8)

    return draw((8.0, 3.0), paint)


def trade_off(points: Mapping[str, tuple[float, float, float]], teacher: float | None) -> bytes:
    """Accuracy in % against parameters and milliseconds, by name; the teacher's accuracy as a line."""

    def paint(figure: Any) -> None:  # noqa: ANN401
        panels = figure.subplots(1, 2, sharey=True)
        for axes, place, label in zip(
            panels, (1, 2), ("parameters", "ms for one sample on the CPU"), strict=True
        ):
            for number, (name, point) in enumerate(points.items()):
                axes.plot(
                    point[place], point[0], "o", color=COLOURS[number % len(COLOURS)], label=name
                )
            if teacher is not None:
                axes.axhline(teacher, color=COLOURS[-1], ls="--", lw=1, label="teacher")
            axes.set_xlabel(label)
            axes.set_xscale("log")
        panels[0].set_ylabel("accuracy, %")
        panels[1].legend(frameon=False, fontsize=8)

    return draw((8.0, 3.0), paint)


def thumbnail(image: npt.NDArray[Any]) -> bytes | None:
    """A PNG of an image (1 or 3, H, W) or (H, W), uint8 or float in [0, 1]; None if it is none."""
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

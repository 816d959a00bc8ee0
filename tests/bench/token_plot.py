"""Plot what encodings of tokens cost against what they are worth, from the figures of two other programs.

    python -m tests.bench.token_gradients work/teacher --data ... --out work/angles-4096.json
    python -m tests.bench.token_plot tokens.png --students work/students-*.json --angles work/angles-*.json

Left: how far students come from hard labels to the live teacher, mean and standard deviation over the seeds.
Right: the angle between the gradient of an encoding and the full one, for each vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.bench.frontier import pyplot
from tests.bench.token_students import CUT, HARD, LIVE

FAMILIES = {"packed": "C0", "sampled": "C1", "basis": "C2", "topk": "C3"}
SIZES = (16, 26, 36, 48, 64, 92, 264)  # marked on the axis
BEFORE = ("packed:26", "packed:36", "topk:64")  # whose names stand to the left
BELOW = ("topk:12", "packed:26", "sampled:18")  # ... or below
LOWEST = -60.0  # per cent of the way; what is below is drawn there, with its number


def main() -> None:
    """Draw both panels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--students", type=Path, nargs="+", required=True)
    parser.add_argument("--angles", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_students(left, [json.loads(file.read_text()) for file in options.students])
    draw_angles(right, [json.loads(file.read_text()) for file in options.angles])
    figure.savefig(options.out, dpi=150)


def draw_students(panel: Any, seeds: list[dict[str, dict[str, float]]]) -> None:  # noqa: ANN401
    """The share of the way of each encoding."""
    for kind, figures in seeds[0].items():
        if kind in (HARD, LIVE, "teacher"):
            continue
        shares = [
            100 * (s[HARD]["loss"] - s[kind]["loss"]) / (s[HARD]["loss"] - s[LIVE]["loss"])
            for s in seeds
        ]
        mean, family = statistics.fmean(shares), kind.partition(":")[0]
        shown = max(mean, LOWEST)
        spread = statistics.stdev(shares) if len(shares) > 1 and shown == mean else 0
        style = "s" if kind == CUT else "o"
        panel.errorbar(figures["bytes"], shown, spread, fmt=style, color=FAMILIES[family])
        note = "" if shown == mean else f", {mean:.0f} %"
        left, below = kind in BEFORE, kind in BELOW
        offset = -4 if left else 4, -12 if below else 5
        panel.annotate(
            kind + note, (figures["bytes"], shown), offset, textcoords="offset points", fontsize=7,
            ha="right" if left else "left",
        )  # fmt: skip
    for start, height, name in ((16, 0, HARD), (150, 100, LIVE)):
        panel.axhline(height, color="gray", linewidth=0.8, linestyle="--")
        panel.text(start, height + 2, name, fontsize=8, color="gray")
    panel.set_ylim(LOWEST - 15, 125)
    panel.set_xscale("log")
    panel.set_xticks(SIZES, map(str, SIZES))
    panel.set_xticks([], minor=True)
    panel.set_xlabel("bytes a token")
    panel.set_ylabel("of the way to the live teacher, %")
    panel.set_title(f"students, {len(seeds)} seeds")


def draw_angles(panel: Any, measured: list[dict[str, Any]]) -> None:  # noqa: ANN401
    """The angles of each family of encodings."""
    for figures, style in zip(measured, ("-", "--", ":", "-."), strict=False):
        families = defaultdict(list)
        for spec, size, angle in figures["angles"]:
            family = spec.partition(":")[0]
            if family in FAMILIES and "cut" not in spec:
                families[family].append((size, max(angle, 0.02)))
        for family, points in families.items():
            label = f"{family}, V = {figures['classes']:,}"
            line = zip(*sorted(points), strict=True)
            panel.plot(*line, style, marker="o", markersize=3, color=FAMILIES[family], label=label)
    panel.axhline(4, color="gray", linewidth=0.8, linestyle="--")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("bytes a token")
    panel.set_ylabel("angle to the full gradient, degrees")
    panel.legend(fontsize=7)
    panel.set_title("gradients")


if __name__ == "__main__":
    main()

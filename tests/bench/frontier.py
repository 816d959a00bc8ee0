"""KL against bytes of every encoding, on rows of a real teacher.

`--rows FILE` is an .npy file of log-probabilities (n, C) at T = 1; tests.bench.recogniser_rows makes one.
The last quarter of the file is held out, so that all rows of one input are on the same side; the directions
of `basis` are fitted to rows drawn from the rest. Each `basis` is compared with the next larger `topk`, and
with topk at the same number of bytes, interpolated linearly in log KL against log bytes. For `sampled`, KL
is KL(stored ‖ teacher), at T = 1 only.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Sampled, TopK
from softcache.cache.encodings import TAIL_TEMPERATURES
from softcache.dump import select_encoding
from tests.bench.encodings import Stored, print_table

TEMPERATURES = (1.0, 4.0)
TOPK = (4, 8, 16, 32, 64, 128, 256, 512)
SAMPLED = (10, 25, 50, 100, 200, 400)
GOAL = 0.1  # share of the KL of topk, at T = 4


@dataclass(frozen=True)
class Point:
    """An encoding with its size and its mean KL by temperature."""

    spec: str
    family: str
    size: int  # bytes per row
    kl: Mapping[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="log p, (n, C)")
    parser.add_argument(
        "--fit-rows", type=int, default=select_encoding.ROWS, help="rows drawn to fit basis"
    )
    parser.add_argument("--held-out", type=int, default=2048, help="rows drawn to measure KL")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows drawn")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also plot, with matplotlib")
    options = parser.parse_args()
    if options.plot:
        pyplot()  # so that a missing matplotlib is reported now, not after minutes
    fit, held = split(options.rows, options.fit_rows, options.held_out, options.seed)
    points = frontier(fit, held, options.seed)
    print(
        f"{options.rows.name}: {held.shape[1]:,} classes, basis fitted to {len(fit):,} rows, KL on "
        f"{len(held):,} others, mean top-1 {float(held.exp().amax(-1).mean()):.2f}\n"
    )
    lines = [
        [p.spec, f"{p.size:,}", *(f"{p.kl[t]:.1e}" if t in p.kl else "-" for t in TEMPERATURES)]
        + [against_topk(p, points, t) for t in TEMPERATURES]
        for p in sorted(points, key=lambda p: (p.family, p.size))
    ]
    headers = (
        "encoding", "bytes per row", *(f"KL T={t:g}" for t in TEMPERATURES),
        *(f"T={t:g}: / next topk, / interpolated" for t in TEMPERATURES),
    )  # fmt: skip
    print_table(lines, headers)
    print(f"\ngoal at T=4: at most {GOAL} of the KL of topk at the same bytes")
    if options.plot:
        draw(points, options.plot, f"{options.rows.name}, {held.shape[1]:,} classes")
        print(f"plot written to {options.plot}")


def split(path: Path, fit: int, held: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows drawn from the first three quarters of the file, and rows drawn from the last quarter."""
    rows = np.load(path, mmap_mode="r")
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise SystemExit(
            f"{path} holds {rows.dtype} of shape {rows.shape}; expected log-probabilities (n, C)"
        )
    border = len(rows) * 3 // 4
    random = np.random.default_rng(seed)

    def draw(low: int, high: int, count: int) -> Tensor:
        indices = low + random.choice(high - low, min(count, high - low), replace=False)
        sorted_rows: npt.NDArray[np.float32] = rows[np.sort(indices)].astype(np.float32)
        order = torch.from_numpy(random.permutation(len(sorted_rows)))
        log_probs = torch.from_numpy(sorted_rows)[order]
        total = log_probs.double().exp().sum(-1)
        if not torch.allclose(total, torch.ones_like(total), atol=1e-2):
            raise SystemExit(
                f"{path}: the exponentials of a row sum to {float(total.min()):.3g} to "
                f"{float(total.max()):.3g}; expected log-probabilities, whose sum is 1"
            )
        return torch.log_softmax(log_probs, dim=-1)

    return draw(0, border, fit), draw(border, len(rows), held)


def frontier(fit: Tensor, held: Tensor, seed: int) -> list[Point]:
    """All candidates of `auto`, and more sizes of topk and sampled, on the held-out rows."""
    classes = held.shape[-1]
    candidates = select_encoding.candidates(fit, temperature=1.0, seed=seed)
    encodings = {candidate.encoding: candidate.shared for candidate in candidates}
    encodings |= {TopK(k, TAIL_TEMPERATURES): {} for k in TOPK if k <= classes // 2}
    encodings |= {Sampled(n): {} for n in SAMPLED}
    points = []
    for encoding, shared in encodings.items():
        stored = Stored(encoding, shared, held)
        kl = stored.kl(held, TEMPERATURES)
        points.append(
            Point(select_encoding.spec_of(encoding), encoding.name, stored.bytes_per_row, kl)
        )
    return points


def against_topk(point: Point, points: Sequence[Point], temperature: float) -> str:
    """KL as a share of the next larger topk's, and of topk's interpolated to the same bytes."""
    if point.family != "basis":
        return ""
    topk = sorted((p for p in points if p.family == "topk"), key=lambda p: p.size)
    larger = [p for p in topk if p.size >= point.size]
    if not larger:
        return "-"
    sizes = [math.log(p.size) for p in topk]
    log_kl = np.interp(math.log(point.size), sizes, [math.log(p.kl[temperature]) for p in topk])
    kl = point.kl[temperature]
    return f"{kl / larger[0].kl[temperature]:.2g}, {kl / math.exp(log_kl):.2g}"


def pyplot() -> ModuleType:
    """matplotlib.pyplot; exits with a message if matplotlib is not installed."""
    try:
        return importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError as error:
        raise SystemExit("--plot needs matplotlib; pip install matplotlib") from error


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Plot KL against bytes, one panel per temperature; lines join the best points of each encoding."""
    plt = pyplot()
    plt.switch_backend("Agg")
    figure, panels = plt.subplots(
        1, len(TEMPERATURES), figsize=(11, 4.8), sharex=True, layout="constrained"
    )
    for panel, temperature in zip(panels, TEMPERATURES, strict=True):
        for number, family in enumerate(sorted({p.family for p in points})):
            line = sorted(
                (p.size, p.kl[temperature])
                for p in points
                if p.family == family and temperature in p.kl
            )
            if line:
                color = f"C{number}"  # the same in every panel
                label = f"{family}, KL(stored ‖ teacher)" if family == "sampled" else family
                edge = zip(*lower_edge(line), strict=True)
                panel.plot(*edge, marker="o", color=color, label=label)
                panel.plot(*zip(*line, strict=True), ".", color=color, alpha=0.4)
        panel.set(xscale="log", yscale="log", title=f"T = {temperature:g}")
        panel.set(xlabel="bytes per row", ylabel="KL(teacher ‖ stored), nats")
        panel.grid(alpha=0.3)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def lower_edge(line: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points, sorted by size, whose KL is lower than that of all smaller ones."""
    edge: list[tuple[int, float]] = []
    for size, kl in line:
        if not edge or kl < edge[-1][1]:
            edge.append((size, kl))
    return edge


if __name__ == "__main__":
    main()

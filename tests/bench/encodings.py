"""The cost and accuracy of each encoding: bytes, KL at four temperatures, speed of encode and decode.

The rows are as peaked as those of a trained teacher: logits s z, with s chosen such that the mean top-1
probability is 0.8 at T = 1. "independent": all z are independent normal numbers, so that the spectrum is
flat, the worst case for `basis`. "head": z = h W, with 128 independent normal numbers h for each row and
one random matrix W (128, C), as in the last layer of a classifier.

Rows are stored at T = 1. `basis` is fitted to other rows than those that are measured. KL is KL(teacher ‖
stored) in nats; for `sampled` it is KL(stored ‖ teacher), at T = 1 only. Encoding starts from float32
log-probabilities in memory and ends with the arrays that are written to the file. Decoding selects random
rows of these arrays in memory and ends with the targets that the loss takes; sparse targets stay sparse.
Both are compared with torch.topk(32) of the same rows, and with selecting random float16 rows in memory
(index_select), in the same rounds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.cache import Encoding, Sampled, TopK
from softcache.dump import select_encoding
from softcache.dump.fidelity import divergence, retemper
from softcache.targets.decode import class_ids, decode, to_dense
from softcache.targets.encode import as_arrays, make_encoder
from softcache.targets.fetch import as_tensor
from softcache.types import Targets
from tests.bench import alternate, machine, ratios

SPECS = (
    "dense", "quantized", "topk:16", "topk:32", "topk:128", "basis:32,8", "basis:64,8", "sampled:50",
    "packed:36",
)  # fmt: skip
KINDS = ("independent", "head")
WIDTH = 128  # of the last layer's input
PEAK = 0.8  # mean top-1 probability
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
PLAIN_K = 32
CHUNK = 128  # rows whose KL is computed at a time
CPU = torch.device("cpu")

Rows = Callable[
    [int, int], Tensor
]  # (count n, number of the random stream) -> log-probabilities (n, C)
Indices = npt.NDArray[np.int64]


class Stored:
    """Rows (n, C), encoded as in the file but held in memory."""

    def __init__(
        self,
        encoding: Encoding,
        shared: Mapping[str, Tensor],
        rows: Tensor,
        temperature: float = 1.0,
    ) -> None:
        self.encoding, self.temperature, self.classes = encoding, temperature, rows.shape[-1]
        self.encode = make_encoder(encoding, shared, temperature=temperature, seed=0, device=CPU)
        self.shared = {name: tensor.float() for name, tensor in shared.items()}
        parts = [as_arrays(self.encode(rows[indices], 0, indices)) for indices in chunks(len(rows))]
        self.arrays = {
            name: as_tensor(np.concatenate([part[name] for part in parts])) for name in parts[0]
        }
        specs = [a for a in encoding.arrays(self.classes) if a.axis == "rows"]
        self.bytes_per_row = sum(
            np.dtype(a.dtype).itemsize * int(np.prod(a.shape, dtype=np.int64)) for a in specs
        )

    def fetch(self, indices: Indices, temperature: float) -> Targets:
        """Targets of the rows `indices` at a temperature, as softcache.targets.fetch returns them."""
        rows = torch.from_numpy(indices)
        selected = {name: torch.index_select(a, 0, rows) for name, a in self.arrays.items()}
        if "ids" in selected:
            selected["ids"] = class_ids(selected["ids"], self.classes)
        return decode(
            self.encoding,
            self.shared | selected,
            temperature=self.temperature,
            wanted=temperature,
            classes=self.classes,
        )

    def kl(self, rows: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> dict[float, float]:
        """Mean KL by temperature, against the rows that were encoded."""
        sampled = isinstance(self.encoding, Sampled)
        possible = [t for t in temperatures if t == self.temperature or not sampled]
        return {
            t: mean_kl(rows, self.temperature, t, partial(self.fetch, temperature=t))
            for t in possible
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 32_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--encodings", nargs="+", default=SPECS, help="as in softcache dump")
    parser.add_argument("--rows", type=int, default=2048, help="rows to measure")
    parser.add_argument(
        "--fit-rows", type=int, default=select_encoding.ROWS, help="rows to fit basis to"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="duration of one measurement of speed"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for classes, kind in itertools.product(options.classes, options.kinds):
        measure(kind, classes, options)
    print(f"\nRatios are medians of {options.repeats} rounds, side by side; {machine()}")


def measure(kind: str, classes: int, options: argparse.Namespace) -> None:
    """Measure one kind of rows, and print the tables."""
    make = synthetic_rows(kind, classes, options.seed)
    rows = make(options.rows, 1)
    stored: dict[str, Stored] = {}
    for spec in options.encodings:
        fit = make(options.fit_rows, 2) if select_encoding.needs_rows(spec) else None
        encoding, shared, _ = select_encoding.select(
            spec, fit, temperature=1.0, seed=options.seed, max_kl=math.inf
        )
        stored[spec] = Stored(encoding, shared, rows)
        print(f"{classes:,} classes, {kind}, {spec}: {encoding}", flush=True)

    rates = speeds(rows, stored, options)
    lines = []
    for spec, encoded in stored.items():
        kl = encoded.kl(rows)
        lines.append(
            [spec, f"{encoded.bytes_per_row:,}"]
            + [f"{kl[t]:.1e}" if t in kl else "-" for t in TEMPERATURES]
            + speed_cells(rates, f"encode {spec}")
            + speed_cells(rates, f"decode {spec}")
        )
    peak = float(rows.exp().amax(-1).mean())
    plain = {name: f"{statistics.median(rates[name]):,.0f}" for name in ("topk", "copy")}
    print(
        f"\n{classes:,} classes, {kind}: {len(rows):,} rows, mean top-1 {peak:.2f}; "
        f"torch.topk({PLAIN_K}) {plain['topk']} rows/s, copy {plain['copy']} rows/s"
    )
    headers = (
        "encoding", "bytes per row", *(f"KL T={t:g}" for t in TEMPERATURES),
        "encode rows/s", "/ topk", "/ copy", "decode rows/s", "/ topk", "/ copy",
    )  # fmt: skip
    print_table(lines, headers)
    tails = [line for encoded in stored.values() for line in tail_lines(encoded, rows)]
    if tails:
        print("\ntopk: KL(teacher ‖ stored) | KL(stored ‖ teacher)")
        print_table(tails, ("k", "tail", *(f"T={t:g}" for t in TEMPERATURES)))


def print_table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> None:
    align = ("left", *["right"] * (len(headers) - 1))
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=align), flush=True)


def synthetic_rows(kind: str, classes: int, seed: int) -> Rows:
    """A function that draws rows of one kind, as described at the top of this module."""

    def normal(stream: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + stream)
        return torch.randn(*shape, generator=generator)

    head = normal(0, WIDTH, classes) / WIDTH**0.5 if kind == "head" else None

    def logits(count: int, stream: int) -> Tensor:
        return (
            normal(stream, count, classes) if head is None else normal(stream, count, WIDTH) @ head
        )

    sample = logits(512, 3)
    low, high = 0.0, 1024.0
    for _ in range(30):  # bisection: the peak grows with the scale
        scale = (low + high) / 2
        peak = float(torch.softmax(sample * scale, -1).amax(-1).mean())
        low, high = (scale, high) if peak < PEAK else (low, scale)
    return lambda count, stream: torch.log_softmax(logits(count, stream) * scale, dim=-1)


def chunks(count: int) -> Iterator[Indices]:
    """The indices 0 to count - 1, at most CHUNK at a time."""
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def mean_kl(
    rows: Tensor, stored_at: float, temperature: float, targets: Callable[[Indices], Targets]
) -> float:
    """Mean KL of targets at `temperature` against rows (n, C) at the temperature `stored_at`."""
    parts = [
        divergence(retemper(rows[indices], stored_at, temperature), targets(indices)).double()
        for indices in chunks(len(rows))
    ]
    return float(torch.cat(parts).mean())


def tail_lines(stored: Stored, rows: Tensor) -> Iterator[list[str]]:
    """Lines for the tail that is stored, for a tail spread at T = 1 and re-tempered, and for no tail."""
    if not isinstance(stored.encoding, TopK):
        return
    k = stored.encoding.k
    variants: dict[str, Callable[[Indices, float], Tensor]] = {
        "mass stored by temperature": lambda i, t: to_dense(stored.fetch(i, t)),
        "uniform at T=1": lambda i, t: retemper(uniform_tail(rows[i], k), 1.0, t),
        "none, renormalised": lambda i, t: retemper(renormalised(rows[i], k), 1.0, t),
    }
    for name, variant in variants.items():
        cells = []
        for temperature in TEMPERATURES:
            both_directions = []
            for indices in chunks(len(rows)):
                teacher = retemper(rows[indices], 1.0, temperature)
                decoded = variant(indices, temperature)
                both_directions.append(
                    torch.stack([divergence(teacher, decoded), divergence(decoded, teacher)], -1)
                )
            # 0 · inf is NaN where float32 cannot hold a probability that no tail covers
            divergences = torch.cat(both_directions).double()
            means = divergences.nan_to_num(nan=math.inf, posinf=math.inf).mean(0)
            cells.append(" | ".join(f"{kl:.1e}" for kl in means))
        yield [str(k), name, *cells]


def uniform_tail(log_probs: Tensor, k: int) -> Tensor:
    """The k largest, and the remaining probability spread evenly over the other classes, (B, C)."""
    head, ids = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    even = (rest - math.log(log_probs.shape[-1] - k)).expand_as(log_probs)
    return even.scatter(-1, ids, head)


def renormalised(log_probs: Tensor, k: int) -> Tensor:
    """The k largest, rescaled to a sum of 1; the other classes have probability 0, (B, C)."""
    head, ids = log_probs.topk(k, dim=-1)
    nothing = torch.full_like(log_probs, -math.inf)
    return nothing.scatter(-1, ids, torch.log_softmax(head, dim=-1))


def speeds(
    rows: Tensor, stored: Mapping[str, Stored], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Rows per second of encoding, decoding and the two baselines, for every round."""
    batch = min(options.batch_size, len(rows))
    half = rows.half()  # (N, C), the copy in memory
    random = np.random.default_rng(options.seed)
    in_order = [np.arange(start, start + batch) for start in range(0, len(rows) - batch + 1, batch)]

    def rate(work: Callable[[Indices], object], batches: Iterable[Indices]) -> float:
        done, start = 0, time.perf_counter()
        for indices in itertools.cycle(batches):
            work(indices)
            done += batch
            if (seconds := time.perf_counter() - start) >= options.seconds:
                break
        return done / seconds

    def at_random() -> list[Indices]:
        order = random.permutation(len(rows))
        return [order[indices] for indices in in_order]

    def slice_of(indices: Indices) -> Tensor:  # a view, without a copy
        return rows[int(indices[0]) : int(indices[-1]) + 1]

    runs: dict[str, Callable[[], float]] = {
        "topk": lambda: rate(lambda i: slice_of(i).topk(PLAIN_K, dim=-1), in_order),
        "copy": lambda: rate(
            lambda i: torch.index_select(half, 0, torch.from_numpy(i)), at_random()
        ),
    }
    for spec, encoded in stored.items():
        runs[f"encode {spec}"] = partial(rate, partial(_encode, encoded, slice_of), in_order)
        runs[f"decode {spec}"] = lambda encoded=encoded: rate(  # type: ignore[misc]
            lambda i: encoded.fetch(i, 1.0), at_random()
        )
    return alternate(runs, options.repeats)


def _encode(stored: Stored, slice_of: Callable[[Indices], Tensor], indices: Indices) -> object:
    return as_arrays(stored.encode(slice_of(indices), 0, indices))


def speed_cells(rates: Mapping[str, Sequence[float]], name: str) -> list[str]:
    """Rows/s, and their ratios to torch.topk and to the copy in memory."""
    relative = [statistics.median(ratios(rates[name], rates[base])) for base in ("topk", "copy")]
    return [f"{statistics.median(rates[name]):,.0f}", *(f"{ratio:.3g}" for ratio in relative)]


if __name__ == "__main__":
    main()

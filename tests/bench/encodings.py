"""What each encoding costs and keeps: bytes, KL at four temperatures, speed of encode and decode.

The rows are peaked, as those of a trained teacher are: logits s z with s such that the mean top-1
probability is 0.8 at T = 1. "independent": all z are independent normal numbers, so that their
spectrum is flat, the worst case for `basis`. "head": z = h W, with 128 independent normal numbers h
for each row and one random matrix W (128, C), as the last layer of a classifier gives them.

Rows are stored at T = 1. `basis` is fitted to other rows than those measured. KL is KL(teacher ‖
stored) in nats, for draws KL(stored ‖ teacher) and at their own temperature only. Encoding starts from
float32 log-probabilities in memory and ends with what the file gets. Decoding picks random rows of
what is stored, in memory, and ends with targets as the loss takes them: sparse ones stay sparse.
Both are compared with torch.topk(32) of the same rows, and with picking random rows of float16 in
memory (index_select), measured in the same rounds.
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
)  # fmt: skip
KINDS = ("independent", "head")
WIDTH = 128  # of the head
PEAK = 0.8
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
PLAIN_K = 32
CHUNK = 128  # rows whose KL is taken at once
CPU = torch.device("cpu")

Rows = Callable[[int, int], Tensor]  # (how many, number of the stream) -> log-probabilities (n, C)
Indices = npt.NDArray[np.int64]


class Stored:
    """Rows (n, C) at temperature `own`, as an encoding keeps them in the file, in memory."""

    def __init__(
        self, encoding: Encoding, shared: Mapping[str, Tensor], rows: Tensor, own: float = 1.0
    ) -> None:
        self.encoding, self.own, self.classes = encoding, own, rows.shape[-1]
        self.encode = make_encoder(encoding, shared, temperature=own, seed=0, device=CPU)
        self.shared = {name: tensor.float() for name, tensor in shared.items()}
        parts = [as_arrays(self.encode(rows[at], 0, at)) for at in chunks(len(rows))]
        self.arrays = {
            name: as_tensor(np.concatenate([part[name] for part in parts])) for name in parts[0]
        }
        specs = [a for a in encoding.arrays(self.classes) if a.axis == "rows"]
        self.bytes_per_row = sum(
            np.dtype(a.dtype).itemsize * int(np.prod(a.shape, dtype=np.int64)) for a in specs
        )

    def fetch(self, at: Indices, wanted: float) -> Targets:
        """Targets of some rows at temperature `wanted`, as softcache.targets.soft_targets does."""
        rows = torch.from_numpy(at)
        picked = {name: torch.index_select(a, 0, rows) for name, a in self.arrays.items()}
        if "ids" in picked:
            picked["ids"] = class_ids(picked["ids"], self.classes)
        return decode(
            self.encoding,
            self.shared | picked,
            temperature=self.own,
            wanted=wanted,
            classes=self.classes,
        )

    def kl(self, rows: Tensor, temperatures: Sequence[float] = TEMPERATURES) -> dict[float, float]:
        """Mean KL by temperature against the rows it was made from."""
        sampled = isinstance(self.encoding, Sampled)
        possible = [t for t in temperatures if t == self.own or not sampled]
        return {t: mean_kl(rows, self.own, t, partial(self.fetch, wanted=t)) for t in possible}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 32_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--encodings", nargs="+", default=SPECS, help="as in softcache dump")
    parser.add_argument("--rows", type=int, default=2048, help="that are measured")
    parser.add_argument(
        "--fit-rows", type=int, default=select_encoding.ROWS, help="that basis is fitted to"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement of speed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for classes, kind in itertools.product(options.classes, options.kinds):
        measure(kind, classes, options)
    print(f"\nRatios are medians of {options.repeats} rounds, side by side; {machine()}")


def measure(kind: str, classes: int, options: argparse.Namespace) -> None:
    """Print the tables of one kind of rows."""
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
    for spec, one in stored.items():
        kl = one.kl(rows)
        lines.append(
            [spec, f"{one.bytes_per_row:,}"]
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
        "encoding", "bytes a row", *(f"KL T={t:g}" for t in TEMPERATURES),
        "encode rows/s", "/ topk", "/ copy", "decode rows/s", "/ topk", "/ copy",
    )  # fmt: skip
    print_table(lines, headers)
    tails = [line for one in stored.values() for line in tail_lines(one, rows)]
    if tails:
        print("\ntopk: KL(teacher ‖ stored) | KL(stored ‖ teacher)")
        print_table(tails, ("k", "tail", *(f"T={t:g}" for t in TEMPERATURES)))


def print_table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> None:
    align = ("left", *["right"] * (len(headers) - 1))
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=align), flush=True)


def synthetic_rows(kind: str, classes: int, seed: int) -> Rows:
    """Rows as the module's docstring says."""

    def normal(stream: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + stream)
        return torch.randn(*shape, generator=generator)

    head = normal(0, WIDTH, classes) / WIDTH**0.5 if kind == "head" else None

    def logits(count: int, stream: int) -> Tensor:
        return (
            normal(stream, count, classes) if head is None else normal(stream, count, WIDTH) @ head
        )

    some = logits(512, 3)
    low, high = 0.0, 1024.0
    for _ in range(30):  # the larger the scale, the higher the peak
        scale = (low + high) / 2
        peak = float(torch.softmax(some * scale, -1).amax(-1).mean())
        low, high = (scale, high) if peak < PEAK else (low, scale)
    return lambda count, stream: torch.log_softmax(logits(count, stream) * scale, dim=-1)


def chunks(count: int) -> Iterator[Indices]:
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def mean_kl(
    rows: Tensor, own: float, wanted: float, targets: Callable[[Indices], Targets]
) -> float:
    """Mean KL at `wanted` of targets against rows (n, C), which are at temperature `own`."""
    parts = [
        divergence(retemper(rows[at], own, wanted), targets(at)).double()
        for at in chunks(len(rows))
    ]
    return float(torch.cat(parts).mean())


def tail_lines(stored: Stored, rows: Tensor) -> Iterator[list[str]]:
    """The same k with a tail spread at T = 1 and re-tempered as it is, and with no tail at all."""
    if not isinstance(stored.encoding, TopK):
        return
    k = stored.encoding.k
    ways: dict[str, Callable[[Indices, float], Tensor]] = {
        "its mass kept by temperature": lambda at, t: to_dense(stored.fetch(at, t)),
        "uniform at T=1": lambda at, t: retemper(uniform_tail(rows[at], k), 1.0, t),
        "none, renormalised": lambda at, t: retemper(renormalised(rows[at], k), 1.0, t),
    }
    for name, way in ways.items():
        cells = []
        for wanted in TEMPERATURES:
            both = [
                torch.stack([divergence(teacher, found), divergence(found, teacher)], -1)
                for at in chunks(len(rows))
                for teacher, found in [(retemper(rows[at], 1.0, wanted), way(at, wanted))]
            ]
            # 0 · inf, where float32 cannot hold a probability that no tail covers
            means = torch.cat(both).double().nan_to_num(nan=math.inf, posinf=math.inf).mean(0)
            cells.append(" | ".join(f"{kl:.1e}" for kl in means))
        yield [str(k), name, *cells]


def uniform_tail(log_probs: Tensor, k: int) -> Tensor:
    """The k largest, and what is left of 1 spread over the others, (B, C)."""
    head, ids = log_probs.topk(k, dim=-1)
    rest = log_probs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    even = (rest - math.log(log_probs.shape[-1] - k)).expand_as(log_probs)
    return even.scatter(-1, ids, head)


def renormalised(log_probs: Tensor, k: int) -> Tensor:
    """The k largest, which sum to 1; the others have no probability, (B, C)."""
    head, ids = log_probs.topk(k, dim=-1)
    nothing = torch.full_like(log_probs, -math.inf)
    return nothing.scatter(-1, ids, torch.log_softmax(head, dim=-1))


def speeds(
    rows: Tensor, stored: Mapping[str, Stored], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Rows per second of each way, in every round."""
    batch = min(options.batch_size, len(rows))
    half = rows.half()  # (N, C), the copy in memory
    random = np.random.default_rng(options.seed)
    in_order = [np.arange(start, start + batch) for start in range(0, len(rows) - batch + 1, batch)]

    def rate(way: Callable[[Indices], object], order: Iterable[Indices]) -> float:
        done, start = 0, time.perf_counter()
        for at in itertools.cycle(order):
            way(at)
            done += batch
            if (seconds := time.perf_counter() - start) >= options.seconds:
                break
        return done / seconds

    def at_random() -> list[Indices]:
        order = random.permutation(len(rows))
        return [order[at] for at in in_order]

    def part(at: Indices) -> Tensor:  # a slice: no copy
        return rows[int(at[0]) : int(at[-1]) + 1]

    runs: dict[str, Callable[[], float]] = {
        "topk": lambda: rate(lambda at: part(at).topk(PLAIN_K, dim=-1), in_order),
        "copy": lambda: rate(
            lambda at: torch.index_select(half, 0, torch.from_numpy(at)), at_random()
        ),
    }
    for spec, one in stored.items():
        runs[f"encode {spec}"] = partial(rate, partial(_encode, one, part), in_order)
        runs[f"decode {spec}"] = lambda one=one: rate(  # type: ignore[misc]
            lambda at: one.fetch(at, 1.0), at_random()
        )
    return alternate(runs, options.repeats)


def _encode(stored: Stored, part: Callable[[Indices], Tensor], at: Indices) -> object:
    return as_arrays(stored.encode(part(at), 0, at))


def speed_cells(rates: Mapping[str, Sequence[float]], name: str) -> list[str]:
    """Rows/s, and its ratios to torch.topk and to the copy in memory."""
    against = [statistics.median(ratios(rates[name], rates[base])) for base in ("topk", "copy")]
    return [f"{statistics.median(rates[name]):,.0f}", *(f"{ratio:.3g}" for ratio in against)]


if __name__ == "__main__":
    main()

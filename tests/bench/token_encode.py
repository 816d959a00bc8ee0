"""What it costs to encode rows of a large vocabulary, next to a forward pass of a model of 1 B parameters.

    python -m tests.bench.token_encode

A forward pass of a token takes two floating-point operations for each parameter. It is stood in for by one
square matrix of 4,096 applied 60 times, which is what the linear layers of such a model do. The head is not
part of it: with it, a pass takes longer. Encoding is bound by memory instead: the table also has how often
the row of log-probabilities would have to be read to take as long.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tabulate import tabulate

from softcache.cache import parse_encoding
from softcache.targets.encode import make_encoder, soften
from tests.bench import machine

ENCODINGS = ("dense", "topk:12", "topk:64", "sampled:18", "sampled:50", "packed:26", "packed:128")
WIDTH, LAYERS = 4096, 60  # about 1.007 B parameters


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=128_256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(options.rows, options.classes, generator=generator, device=device)
    states = torch.randn(options.rows, WIDTH, generator=generator, device=device).to(half)
    layer = (torch.randn(WIDTH, WIDTH, generator=generator, device=device) / WIDTH**0.5).to(half)
    log_probs = soften(logits, 1.0)

    def forward() -> None:
        hidden = states
        for _ in range(LAYERS):
            hidden = hidden @ layer

    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "read": lambda: log_probs.sum(-1),
        "softmax": lambda: soften(logits, 1.0),
    }
    rows = np.arange(options.rows)
    for spec in ENCODINGS:
        encode = make_encoder(parse_encoding(spec, 1.0), {}, temperature=1.0, seed=0, device=device)
        work[spec] = lambda encode=encode: encode(log_probs, 0, rows, rows)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in work}
    with torch.inference_mode():
        for _ in range(options.repeats + 1):
            for name, run in work.items():
                times[name].append(seconds(run, device))
    table = []
    for name in ("softmax", *ENCODINGS):
        shares = [t / f for t, f in zip(times[name][1:], times["forward"][1:], strict=True)]
        passes = statistics.median(times[name][1:]) / statistics.median(times["read"][1:])
        spread = f"{min(shares):.1%} to {max(shares):.1%}"
        table.append((name, f"{statistics.median(shares):.1%}", spread, f"{passes:.1f}"))
    print(machine())
    print(f"{options.rows} rows, V = {options.classes:,}, {device.type}, forward in {half}")
    print(tabulate(table, headers=("", "of a forward pass", "min to max", "reads of the row")))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long it takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

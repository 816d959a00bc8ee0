"""Encodings on the tokens of a language model: bytes, KL, speed, and the perplexity of students of them.

    python -m tests.bench.language_model work
    python -m tests.bench.token_encodings work

Each encoding is dumped and its students are trained on the same batches, over several seeds, next to students
of hard labels and of the live teacher. Finished figures are kept in work/encodings.json, and a rerun goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from softcache.cache import Cache, open_cache
from softcache.data.loader import Batch
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.join.joined_data import JoinedData, TrainingBatch
from softcache.join.match import join
from softcache.join.samples import open_samples
from softcache.targets.decode import to_dense
from softcache.targets.fetch import stored_targets
from softcache.train.accelerator import make_accelerator
from softcache.train.loop import fit
from softcache.train.options import make_train_config
from tests.bench import machine
from tests.bench.language_model import STUDENT, data

ENCODINGS = (
    "dense", "quantized", "topk:16", "topk:64", "basis:32,4", "basis:64,8", "basis:192,8", "sampled:50",
    "packed:26", "packed:36",
)  # fmt: skip
CPU = torch.device("cpu")

Figures = dict[str, Any]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1500, help="of the training text")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS))
    options = parser.parse_args()
    folder: Path = options.folder
    kept = folder / "encodings.json"
    figures: dict[str, Figures] = json.loads(kept.read_text()) if kept.exists() else {}
    settings = options.samples, options.epochs, options.seeds

    def measure(name: str, work: Callable[[], Figures]) -> None:
        if name not in figures:
            figures[name] = work()
            kept.write_text(json.dumps(figures, indent=1))
            print(name, figures[name], flush=True)

    for spec in options.encodings:
        measure(spec, lambda spec=spec: of_encoding(folder, spec, *settings))  # type: ignore[misc]
    measure("hard labels", lambda: {"perplexity": of_students(folder, None, False, *settings)})
    dense = cache_path(folder, "dense")
    measure("live teacher", lambda: {"perplexity": of_students(folder, dense, True, *settings)})
    print(machine())
    print(table(figures))


def cache_path(folder: Path, spec: str) -> Path:
    """The cache of an encoding."""
    return folder / f"cache-{spec.replace(':', '-').replace(',', '-')}.h5"


def of_encoding(folder: Path, spec: str, samples: int, epochs: int, seeds: int) -> Figures:
    """Everything about one encoding."""
    out = cache_path(folder, spec)
    start = time.perf_counter()
    cache = dump(
        DumpConfig(
            teacher=f"hf:{folder / 'teacher'}",
            data=f"{data(folder, 'train.jsonl')}&shuffle=0&samples={samples}",
            temperature=1.0,
            encoding=spec,
            embed_inputs=True,
            out=out,
            overwrite=True,
        )
    )
    seconds = time.perf_counter() - start
    fidelity = (cache.header.summary or {})["fidelity"]["at"]
    return {
        "bytes": cache.header.bytes_per_row,
        "file": cache.header.file_bytes / cache.header.row_count,
        "kl1": fidelity["1"],
        "kl2": fidelity.get("2"),
        "dump": cache.header.row_count / seconds,
        "decode": decode_rate(cache),
        "perplexity": of_students(folder, out, False, samples, epochs, seeds),
    }


def decode_rate(cache: Cache, rows: int = 512) -> float:
    """Tokens a second that are read in random order and decoded to all classes."""
    fetch = stored_targets(cache, [1.0], CPU)
    random = np.random.default_rng(0)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 1:
        chosen = random.integers(0, cache.header.row_count, rows)
        to_dense(fetch(np.zeros(rows, np.int64), chosen)[1.0].decoded())
        done += rows
    return done / (time.perf_counter() - start)


@dataclass(frozen=True)
class LiveTeacher(JoinedData):
    """Joined data whose soft targets come from the teacher itself, for every batch anew."""

    teacher: Any = None

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        """A batch with the teacher's log-probabilities at T = 1."""
        given = super().training_batch(batch, epoch, device)
        if given.rows is None:
            raise TypeError("the samples have one row each")
        log_probs = torch.cat(list(self.teacher.row_log_probs(given.inputs, given.rows, 1.0)))
        return given._replace(targets={1.0: log_probs.clone()})


def of_students(
    folder: Path, cache: Path | None, live: bool, samples: int, epochs: int, seeds: int
) -> list[float]:
    """The test perplexity of students that differ in their seed, from a cache, labels or the teacher."""
    source_of = cache or cache_path(folder, "dense")
    config = make_train_config(
        students=[{"student": STUDENT, "seed": seed} for seed in range(seeds)],
        cache=source_of,
        alpha=1.0 if cache else 0.0,
        temperature=1.0,
        epochs=epochs,
        batch_tokens=1024,
        learning_rate=2e-3,
        max_grad_norm=1.0,
        out=folder / "runs" / ("live" if live else source_of.stem if cache else "hard"),
        overwrite=True,
    )
    opened = open_cache(source_of)
    part = join(open_samples(opened, None), opened, augment=None, temperatures=[1.0], device=CPU)
    if live:
        part = LiveTeacher(**vars(part), teacher=live_teacher(folder))
    students = fit(
        config, make_accelerator("cpu", "fp32"), [part], open_source(data(folder, "test.jsonl"))
    )
    scores = [student.evaluation.scores for student in students if student.evaluation]
    return [score.line()["perplexity"] for score in scores if score]


def live_teacher(folder: Path) -> Any:  # noqa: ANN401  # an Ensemble
    """The teacher, as a dump loads it."""
    from softcache.data.augment import parse_augment
    from softcache.dump.prepare import load_teachers

    config = DumpConfig(
        teacher=f"hf:{folder / 'teacher'}", data="-", temperature=1.0, out=folder / "none.h5"
    )
    return load_teachers(
        config, open_source(data(folder, "test.jsonl")), parse_augment(None, seed=0, total=1)
    )


def table(figures: dict[str, Figures]) -> str:
    """The figures of all encodings, as text; how far a student is from hard labels to the live teacher."""
    losses = {
        name: statistics.fmean(map(math.log, figure["perplexity"]))
        for name, figure in figures.items()
    }
    hard, live = losses["hard labels"], losses["live teacher"]
    rows = []
    for name, figure in figures.items():
        spread = figure["perplexity"]
        deviation = statistics.stdev(spread) if len(spread) > 1 else 0.0
        share = f"{(hard - losses[name]) / (hard - live):.0%}"
        rows.append(
            [
                name,
                *(figure.get(key, "-") for key in ("bytes",)),
                f"{figure['file']:.0f}" if "file" in figure else "-",
                *(f"{figure[key]:.1e}" if figure.get(key) else "-" for key in ("kl1", "kl2")),
                *(f"{figure[key]:,.0f}" if key in figure else "-" for key in ("dump", "decode")),
                f"{statistics.fmean(spread):.2f} ± {deviation:.2f}",
                share,
            ]
        )
    headers = (
        "encoding", "bytes a token", "in the file", "KL at T=1", "KL at T=2", "dump tokens/s",
        "decode tokens/s", "perplexity", "of the way",
    )  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    main()

"""A student of the cache against a student of the live teacher: same seed, same batches.

No augmentation. For each seed two runs of softcache.train.fit, which differ only in where the soft
targets come from. Shown are the losses of the first steps, which should agree, and the final test
errors, whose difference should be no larger than what another seed makes. Training amplifies any
difference: for scale, a third run has the live teacher with noise of 1e-6 in its log-probabilities,
for the first steps only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.cache import Cache
from softcache.cli.demo_commands import EPOCHS, STUDENT, TEACHER, TEMPERATURE
from softcache.data.augment import Augmentation
from softcache.data.loader import Batch
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.prepare import load_teachers
from softcache.join.joined_data import JoinedData, TrainingBatch
from softcache.join.match import join
from softcache.teachers.ensemble import Ensemble
from softcache.train.config import TrainConfig, make_train_config
from softcache.train.loop import fit
from softcache.train.prepare import make_accelerator
from softcache.train.student import Student
from softcache.types import Labels, Targets
from tests.bench import first_samples, machine, work_folder
from tests.configs import replace

GOAL = 1e-3  # relative difference of the losses
NOISE = 1e-6


@dataclass(frozen=True)
class Run:
    """What a run came to: the loss of every step, and the errors if it went to its end."""

    losses: npt.NDArray[np.float64]
    errors: int | None
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--weights", type=Path, default=Path("data/teacher.safetensors"))
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--data", default="idx:data/mnist")
    parser.add_argument("--eval-data", default="idx:data/mnist@test")
    parser.add_argument("--samples", type=int, help="train on the first of the data [default: all]")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=100, help="whose losses are compared")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--losses-only",
        action="store_true",
        help="stop all runs after --steps, under the same schedule",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--folder", type=Path, help="where the cache goes [default: a temporary folder]"
    )
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        data = first_samples(options.data, options.samples, folder)
        dump_config = DumpConfig(
            teacher=options.teacher,
            weights=options.weights,
            data=data,
            temperature=options.temperature,
            out=folder / "live.h5",
            device=options.device,
        )
        cache = dump(dump_config)
        config = make_train_config(
            student=options.student,
            data=data,
            out=folder / "run",
            cache=cache.path,
            alpha=options.alpha,
            epochs=options.epochs,
            batch_size=options.batch_size,
            device=options.device,
        )
        source, eval_source = open_source(data), open_source(options.eval_data)
        teacher = load_teachers(dump_config, source, Augmentation(None, 0))
        ways = make_ways(source, cache, teacher)
        runs = {}
        for seed in options.seeds:
            for way, part in ways.items():
                short = options.losses_only or way == "live, noise"
                run = train_once(
                    replace(config, seed=seed),
                    part,
                    eval_source,
                    stop_after=options.steps if short else None,
                )
                runs[seed, way] = run
                print(
                    f"seed {seed}, {way}: {len(run.losses)} steps, {run.seconds:.0f} s", flush=True
                )
    report(runs, options.seeds, options.steps)


@dataclass(frozen=True)
class LiveData(JoinedData):
    """The teacher is asked about the very inputs that the student sees."""

    teacher: Ensemble | None = None
    temperature: float = 1.0
    noise: float = 0.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        found = super().training_batch(batch, epoch, device)
        assert self.teacher is not None
        said = self.teacher.log_probs(found.inputs, self.temperature).clone()
        if self.noise:
            said = torch.log_softmax(said + self.noise * torch.randn_like(said), dim=-1)
        return found._replace(targets={self.temperature: said})


def make_ways(source: Source, cache: Cache, teacher: Ensemble) -> dict[str, JoinedData]:
    """The same data, which differ in nothing but where their soft targets come from."""
    temperature = cache.header.temperature
    part = join(source, cache, augment=None, temperatures=[temperature], device=teacher.device)
    asked = vars(part) | {"targets": None, "teacher": teacher, "temperature": temperature}
    return {
        "cache": part,
        "live": LiveData(**asked),
        "live, noise": LiveData(**asked, noise=NOISE),
    }


def train_once(
    config: TrainConfig,
    part: JoinedData,
    eval_source: Source,
    stop_after: int | None,
) -> Run:
    """A run of fit, or of its first `stop_after` steps."""
    accelerator = make_accelerator(config.device, config.precision)
    errors = None
    start = time.perf_counter()
    with recorded_losses(stop_after) as losses, suppress(Enough):
        evaluation = fit(config, accelerator, [part], eval_source)[0].evaluation
        assert evaluation is not None  # fit evaluates, since it has eval_source
        errors = evaluation.errors
    return Run(torch.stack(losses).double().numpy(), errors, time.perf_counter() - start)


class Enough(Exception):
    """As many steps are done as were asked for."""


@contextmanager
def recorded_losses(stop_after: int | None) -> Iterator[list[Tensor]]:
    """The total loss of every step, which a learner otherwise averages and forgets."""
    losses: list[Tensor] = []
    take_step = Student.step

    def step(
        learner: Student,
        inputs: Tensor,
        labels: Labels,
        targets: Targets | None,
        temperature: float,
    ) -> None:
        take_step(learner, inputs, labels, targets, temperature)
        losses.append(learner.losses[-1][0].cpu())
        if len(losses) == stop_after:
            raise Enough

    with patch.object(Student, "step", step):
        yield losses


def report(runs: dict[tuple[int, str], Run], seeds: list[int], steps: int) -> None:
    """The tables; exits with 1 if the losses are further apart than the goal."""
    lines, missed = [], False
    for seed in seeds:
        for way in ("cache", "live, noise"):
            found, live = (runs[seed, name].losses[:steps] for name in (way, "live"))
            apart = np.abs(found - live) / np.abs(live)
            bad = bool(apart.max() > GOAL)
            missed |= bad and way == "cache"
            verdict = ("no" if bad else "yes") if way == "cache" else "-"
            lines.append(
                (seed, way, len(apart), f"{apart[:10].max():.1e}", f"{apart.max():.1e}", verdict)
            )
    print(
        f"\nRelative difference of the training losses from those of the live teacher; {machine()}"
    )
    headers = ("seed", "soft targets", "steps", "largest of 10", "largest", f"<= {GOAL:g}")
    print(tabulate(lines, headers=headers, disable_numparse=True))
    if all(run.errors is not None for (_, way), run in runs.items() if way != "live, noise"):
        report_errors(runs, seeds)
    if missed:
        raise SystemExit(f"the losses differ by more than {GOAL:g}")


def report_errors(runs: dict[tuple[int, str], Run], seeds: list[int]) -> None:
    errors = {place: run.errors for place, run in runs.items() if run.errors is not None}
    lines = [
        (seed, way, found, len(runs[seed, way].losses), f"{runs[seed, way].seconds:.0f}")
        for (seed, way), found in errors.items()
    ]
    print("\nTest errors at the end")
    print(tabulate(lines, headers=("seed", "soft targets", "errors", "steps", "seconds")))
    by_way = [abs(errors[seed, "cache"] - errors[seed, "live"]) for seed in seeds]
    by_seed = [
        abs(errors[a, way] - errors[b, way])
        for way in ("cache", "live")
        for a, b in combinations(seeds, 2)
    ]
    print(f"\nErrors differ by {by_way} between cache and live teacher (one a seed),")
    print(f"by {by_seed} between two seeds (each pair; from the cache first, then live)")


if __name__ == "__main__":
    main()

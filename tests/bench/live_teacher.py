"""A student of the cache against a student of the live teacher: same seed, same batches.

There is no augmentation. For each seed, fit() of softcache.train.loop runs twice; the runs differ only in
where the soft targets come from. The losses of the first steps should agree, and the final test errors
should differ by no more than between two seeds. Training amplifies any difference: for comparison, a third
run uses the live teacher with noise of 1e-6 in its log-probabilities, for the first steps only.
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
from softcache.train.accelerator import make_accelerator
from softcache.train.config import TrainConfig
from softcache.train.loop import fit
from softcache.train.options import make_train_config
from softcache.train.student import Student
from softcache.types import Labels, Targets
from tests.bench import first_samples, machine, work_folder
from tests.configs import replace

GOAL = 1e-3  # relative difference of the losses
NOISE = 1e-6


@dataclass(frozen=True)
class Run:
    """The result of a run."""

    losses: npt.NDArray[np.float64]  # (steps,)
    errors: int | None  # None if it was stopped early
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
    parser.add_argument("--samples", type=int, help="train on the first samples [default: all]")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=100, help="steps to compare the losses of")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--losses-only",
        action="store_true",
        help="stop all runs after --steps, with the same schedule",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--folder", type=Path, help="folder for the cache [default: a temporary one]"
    )
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        data_spec = first_samples(options.data, options.samples, folder)
        dump_config = DumpConfig(
            teacher=options.teacher,
            weights=options.weights,
            data=data_spec,
            temperature=options.temperature,
            out=folder / "live.h5",
            device=options.device,
        )
        cache = dump(dump_config)
        config = make_train_config(
            student=options.student,
            data=data_spec,
            out=folder / "run",
            cache=cache.path,
            alpha=options.alpha,
            epochs=options.epochs,
            batch_size=options.batch_size,
            device=options.device,
        )
        source, eval_source = open_source(data_spec), open_source(options.eval_data)
        teacher = load_teachers(dump_config, source, Augmentation(None, 0))
        variants = make_variants(source, cache, teacher)
        runs = {}
        for seed in options.seeds:
            for variant, data in variants.items():
                stop_early = options.losses_only or variant == "live, noise"
                run = train_once(
                    replace(config, seed=seed),
                    data,
                    eval_source,
                    stop_after=options.steps if stop_early else None,
                )
                runs[seed, variant] = run
                print(
                    f"seed {seed}, {variant}: {len(run.losses)} steps, {run.seconds:.0f} s",
                    flush=True,
                )
    report(runs, options.seeds, options.steps)


@dataclass(frozen=True)
class LiveData(JoinedData):
    """Soft targets from the teacher, which runs on the inputs that the student sees."""

    teacher: Ensemble | None = None
    temperatures: tuple[float, ...] = ()
    noise: float = 0.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        training_batch = super().training_batch(batch, epoch, device)
        targets = {t: self._log_probs(training_batch.inputs, t) for t in self.temperatures}
        return training_batch._replace(targets=targets)

    def _log_probs(self, inputs: Tensor, temperature: float) -> Tensor:
        assert self.teacher is not None
        with torch.inference_mode():
            log_probs = self.teacher.log_probs(inputs, temperature)
        log_probs = log_probs.clone()
        if self.noise:
            noise = self.noise * torch.randn_like(log_probs)
            log_probs = torch.log_softmax(log_probs + noise, dim=-1)
        return log_probs


def make_variants(source: Source, cache: Cache, teacher: Ensemble) -> dict[str, JoinedData]:
    """The same samples with soft targets from the cache, the live teacher, and the teacher with noise."""
    temperature = cache.header.temperature
    joined = join(source, cache, augment=None, temperatures=[temperature], device=teacher.device)
    live = vars(joined) | {"targets": None, "teacher": teacher, "temperatures": (temperature,)}
    return {
        "cache": joined,
        "live": LiveData(**live),
        "live, noise": LiveData(**live, noise=NOISE),
    }


def train_once(
    config: TrainConfig,
    data: JoinedData,
    eval_source: Source,
    stop_after: int | None,
) -> Run:
    """Run fit(), or only its first `stop_after` steps."""
    accelerator = make_accelerator(config.device, config.precision)
    errors = None
    start = time.perf_counter()
    with recorded_losses(stop_after) as losses, suppress(EnoughSteps):
        evaluation = fit(config, accelerator, [data], eval_source)[0].evaluation
        assert evaluation is not None  # fit() evaluates, since it has eval_source
        errors = evaluation.errors
    return Run(torch.stack(losses).double().numpy(), errors, time.perf_counter() - start)


class EnoughSteps(Exception):
    """Ends a run after `stop_after` steps."""


@contextmanager
def recorded_losses(stop_after: int | None) -> Iterator[list[Tensor]]:
    """Record the total loss of every step, of which a student otherwise keeps only the mean."""
    losses: list[Tensor] = []
    take_step = Student.step

    def step(
        student: Student,
        inputs: Tensor,
        labels: Labels,
        targets: Targets | None,
        weight: float = 1.0,
    ) -> None:
        take_step(student, inputs, labels, targets, weight)
        losses.append(student.losses[-1][0].cpu())
        if len(losses) == stop_after:
            raise EnoughSteps

    with patch.object(Student, "step", step):
        yield losses


def report(runs: dict[tuple[int, str], Run], seeds: list[int], steps: int) -> None:
    """Print the tables; exit with 1 if the losses differ by more than the goal."""
    lines, missed = [], False
    for seed in seeds:
        for variant in ("cache", "live, noise"):
            losses, live = (runs[seed, name].losses[:steps] for name in (variant, "live"))
            difference = np.abs(losses - live) / np.abs(live)
            too_large = bool(difference.max() > GOAL)
            missed |= too_large and variant == "cache"
            verdict = ("no" if too_large else "yes") if variant == "cache" else "-"
            largest = (f"{values.max():.1e}" for values in (difference[:10], difference))
            lines.append((seed, variant, len(difference), *largest, verdict))
    print(
        f"\nRelative difference of the training losses from those of the live teacher; {machine()}"
    )
    headers = ("seed", "soft targets", "steps", "largest of 10", "largest", f"<= {GOAL:g}")
    print(tabulate(lines, headers=headers, disable_numparse=True))
    full_runs = [run for (_, variant), run in runs.items() if variant != "live, noise"]
    if all(run.errors is not None for run in full_runs):
        report_errors(runs, seeds)
    if missed:
        raise SystemExit(f"the losses differ by more than {GOAL:g}")


def report_errors(runs: dict[tuple[int, str], Run], seeds: list[int]) -> None:
    """Print the test errors, and their differences between variants and between seeds."""
    errors = {key: run.errors for key, run in runs.items() if run.errors is not None}
    lines = [
        (*key, count, len(runs[key].losses), f"{runs[key].seconds:.0f}")
        for key, count in errors.items()
    ]
    print("\nTest errors at the end")
    print(tabulate(lines, headers=("seed", "soft targets", "errors", "steps", "seconds")))
    between_variants = [abs(errors[seed, "cache"] - errors[seed, "live"]) for seed in seeds]
    between_seeds = [
        abs(errors[first, variant] - errors[second, variant])
        for variant in ("cache", "live")
        for first, second in combinations(seeds, 2)
    ]
    print(f"\nErrors differ by {between_variants} between cache and live teacher (one per seed),")
    print(f"and by {between_seeds} between two seeds (all pairs; first the cache, then live)")


if __name__ == "__main__":
    main()

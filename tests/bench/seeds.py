"""A student of the cache against its hard-label baseline, over several seeds.

There is one cache, and one `softcache train --baseline` for each seed. The baseline has the same initial
weights, batches and number of steps as the student.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tabulate import tabulate

from softcache.cli.demo_commands import EPOCHS, STUDENT, TEACHER, TEMPERATURE
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.bench import first_samples, machine, work_folder


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--dump-temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--temperature", type=float, help="of training [default: as in the dump]")
    parser.add_argument("--views", type=int, default=1, help="as in softcache dump")
    parser.add_argument("--augment", help="as in softcache dump")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--folder", type=Path, help="folder for cache and runs [default: a temporary one]"
    )
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        data = first_samples(options.data, options.samples, folder)
        cache = dump(
            DumpConfig(
                teacher=options.teacher,
                weights=options.weights,
                data=data,
                eval_data=options.eval_data,
                temperature=options.dump_temperature,
                views=options.views,
                augment=options.augment,
                out=folder / "seeds.h5",
                device=options.device,
            )
        )
        errors: dict[str, list[int]] = {}
        for seed in options.seeds:
            config = make_train_config(
                student=options.student,
                data=data,
                eval_data=options.eval_data,
                cache=cache.path,
                out=folder / f"seed-{seed}",
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.lr,
                alpha=options.alpha,
                temperature=options.temperature,
                seed=seed,
                baseline=True,
                device=options.device,
                overwrite=True,
            )
            for student in train(config):
                assert student.evaluation is not None  # train() evaluates on eval_data
                errors.setdefault(student.name, []).append(student.evaluation.errors)
    print(
        f"\nTest errors of {options.student} after {options.epochs} epochs, alpha {options.alpha}, T "
        f"{options.temperature or options.dump_temperature}, {options.views} view(s); {machine()}"
    )
    lines = [
        (name, *counts, f"{statistics.mean(counts):.1f}", deviation(counts))
        for name, counts in errors.items()
    ]
    distilled, baseline = errors.values()
    fewer = [hard - soft for soft, hard in zip(distilled, baseline, strict=True)]
    lines.append(("fewer", *fewer, f"{statistics.mean(fewer):.1f}", deviation(fewer)))
    headers = ("student", *(f"seed {seed}" for seed in options.seeds), "mean", "std. deviation")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def deviation(values: list[int]) -> str:
    """The standard deviation as a table cell."""
    return f"{statistics.stdev(values):.1f}" if len(values) > 1 else "-"


if __name__ == "__main__":
    main()

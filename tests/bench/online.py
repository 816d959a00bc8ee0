"""Distilling from the cache against running the live teacher in every step.

Student, augmented views, batches, number of steps and training loop are the same; only the source of the
soft targets differs. The ideal ratio is (teacher + student) / student: the forward pass of the teacher
without its softmax, and a training step on soft targets that are already in memory, each measured alone on
one batch. "of ideal" is the measured ratio as a share of the ideal one; above 1, the live loop costs more
than the sum of its parts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from softcache.cache import Cache
from softcache.data.source import ArraySource
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.prepare import load_teachers
from softcache.join.joined_data import JoinedData
from softcache.join.match import join
from softcache.train.accelerator import make_accelerator
from softcache.train.loop import fit
from softcache.train.options import make_train_config
from softcache.train.prepare import make_students
from softcache.util.tensors import to_float
from tests.bench import alternate, first, machine, open_arrays, ratios, spread, work_folder
from tests.bench.dump_overhead import augmentation_of, make_weights
from tests.bench.live_teacher import LiveData
from tests.configs import replace


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--teachers", nargs="+", default=["cnn:16,32,64", "resnet:20,16", "resnet:56,32"]
    )
    parser.add_argument("--student", default="cnn:8,16,32")
    parser.add_argument("--data", default="idx:data/mnist", help="idx:DIR or npz:FILE")
    parser.add_argument("--augment", default="shift:2")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="steps per training run")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    source = first(open_arrays(options.data), options.steps * options.batch_size)
    lines = []
    with work_folder(options.folder) as folder:
        for spec in options.teachers:
            lines.append(measure(spec, source, options, folder))
            print(f"{spec}: done", flush=True)
    headers = ("teacher", "live / cached", "min", "max", "ideal", "of ideal")
    print(
        f"\nWall time of {options.steps} steps of {options.student} on batches of "
        f"{options.batch_size}, median of {options.repeats} pairs side by side; {machine()}"
    )
    print(tabulate(lines, headers=headers, disable_numparse=True))


def measure(spec: str, source: ArraySource, options: argparse.Namespace, folder: Path) -> list[str]:
    """The line of the table for one teacher."""
    config = DumpConfig(
        teacher=spec,
        weights=folder / "teacher.safetensors",
        data=source.name,
        temperature=4.0,
        views=options.views,
        augment=options.augment,
        out=folder / "online.h5",
        classes=10,
        device=options.device,
        overwrite=True,
    )
    make_weights(spec, source, 10, folder / "teacher.safetensors")
    cache = dumped(config, source, folder)
    accelerator = make_accelerator(options.device, "fp32")
    teacher = load_teachers(config, source, augmentation_of(config, source))
    joined = join(
        source, cache, augment=None, temperatures=[config.temperature], device=accelerator.device
    )
    live = LiveData(**vars(joined) | {"targets": None}, teacher=teacher, temperatures=(4.0,))
    training = make_train_config(
        student=options.student,
        data=source.name,
        cache=cache.path,
        out=folder / "run",
        epochs=1,
        batch_size=options.batch_size,
        alpha=1.0,
        temperature=config.temperature,
        device=options.device,
    )

    def training_seconds(data: JoinedData) -> float:
        start = time.perf_counter()
        fit(training, accelerator, [data], None)
        return time.perf_counter() - start

    student = make_students(training, accelerator, [joined], options.steps)[0]
    raw = torch.from_numpy(source.inputs[: options.batch_size])
    inputs = to_float(raw).to(accelerator.device)
    labels = torch.zeros(len(inputs), dtype=torch.int64, device=accelerator.device)
    with torch.inference_mode():
        log_probs = teacher.log_probs(inputs, config.temperature)
    targets = log_probs.clone()

    def student_alone() -> float:
        start = time.perf_counter()
        for _ in range(options.steps):
            student.step(inputs, labels, targets)
        float(student.losses[-1][0])  # waits for the device
        return time.perf_counter() - start

    def teacher_alone() -> float:
        start = time.perf_counter()
        for _ in range(options.steps):
            teacher.teachers[0].logits(inputs, np.arange(len(inputs)))
        return time.perf_counter() - start

    seconds = alternate(
        {
            "live": lambda: training_seconds(live),
            "cached": lambda: training_seconds(joined),
            "student": student_alone,
            "teacher": teacher_alone,
        },
        options.repeats,
    )
    speedup = ratios(seconds["live"], seconds["cached"])
    ideal = statistics.median(1 + x for x in ratios(seconds["teacher"], seconds["student"]))
    return [spec, *spread(speedup), f"{ideal:.2f}", f"{statistics.median(speedup) / ideal:.2f}"]


def dumped(config: DumpConfig, source: ArraySource, folder: Path) -> Cache:
    """Dump a cache of the samples of `source` alone."""
    path = folder / "samples.npz"
    np.savez(path, x=source.inputs, y=source.labels)
    return dump(replace(config, data=f"npz:{path}"))


if __name__ == "__main__":
    main()

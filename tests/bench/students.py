"""Four students in one run against four runs with one student each.

Each run is a process of its own, as on the command line. The weights must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tabulate import tabulate

from softcache.cli.demo_commands import TEACHER
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from tests.bench import alternate, first_samples, machine, ratios, spread, work_folder

STUDENTS = ("cnn:8,16x2,32x2", "cnn:8,16,32", "cnn:4,8x2,16x2", "mlp:64")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--weights", type=Path, default=Path("data/teacher.safetensors"))
    parser.add_argument("--data", default="idx:data/mnist")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--augment", nargs="+", default=["none", "shift:2,mixup"])
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    lines = []
    with work_folder(options.folder) as folder:
        for augment in options.augment:
            lines.append(measure(augment, options, folder))
            print(f"{augment}: done", flush=True)
    headers = ("augment", "four runs, s", "one run, s", "one / four", "min", "max")
    print(f"\n{len(options.students)} students, {options.epochs} epochs; {machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def measure(augment: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """The line of the table for one augmentation."""
    data = first_samples(options.data, options.samples, folder)
    cache = dump(
        DumpConfig(
            teacher=options.teacher,
            weights=options.weights,
            data=data,
            temperature=4.0,
            classes=10,
            augment=None if augment == "none" else augment,
            out=folder / "students.h5",
            overwrite=True,
        )
    )

    def run(out: str, *students: str) -> None:
        command = [sys.executable, "-m", "softcache", "train", str(cache.path), "--data", data]
        command += [f"--student={student}" for student in students]
        command += [f"--epochs={options.epochs}", f"--out={folder / out}", "--overwrite"]
        subprocess.run(command, check=True, capture_output=True)

    def four_runs() -> float:
        start = time.perf_counter()
        for number, student in enumerate(options.students):
            run(f"alone-{number}", student)
        return time.perf_counter() - start

    def one_run() -> float:
        start = time.perf_counter()
        run("together", *options.students)
        return time.perf_counter() - start

    seconds = alternate({"four": four_runs, "one": one_run}, options.repeats)
    check_same(folder, options.students)
    return [
        augment,
        *(f"{statistics.median(seconds[name]):.1f}" for name in ("four", "one")),
        *spread(ratios(seconds["one"], seconds["four"])),
    ]


def check_same(folder: Path, students: list[str]) -> None:
    """Stop unless the students that were trained together are the same as those trained alone."""
    together = sorted((folder / "together").glob("*/student.safetensors"))
    alone = [load_file(folder / f"alone-{n}" / "student.safetensors") for n in range(len(students))]
    for path in together:
        weights = load_file(path)
        same = any(
            set(weights) == set(other) and all(torch.equal(weights[n], other[n]) for n in weights)
            for other in alone
        )
        if not same:
            raise SystemExit(
                f"{path.parent.name} has other weights than all students that were trained alone"
            )


if __name__ == "__main__":
    main()

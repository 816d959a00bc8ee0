"""kill -9 at random times of a training, then the same command: the weights at the end, to the bit."""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from softcache.cli.demo_commands import TEACHER
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.train.run_folder import UNFINISHED_METRICS
from tests.bench import first_samples, machine, work_folder

FILES = ("student.safetensors", "metrics.jsonl", "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--data", default="idx:data/mnist")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--students", nargs="+", default=["cnn:8,16x2", "mlp:64"])
    parser.add_argument("--options", nargs="*", default=["--ema=0.99", "--extra-augment=cutout:6"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=0.01, help="between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        data = first_samples(options.data, options.samples, folder)
        cache = dump(
            DumpConfig(
                teacher=TEACHER, weights=Path("data/teacher.safetensors"), data=data, temperature=4.0,
                classes=10, views=2, augment="shift:2", out=folder / "resume.h5", overwrite=True,
            )
        )  # fmt: skip
        command = [
            sys.executable, "-m", "softcache", "train", str(cache.path), "--data", data, "--baseline",
            f"--epochs={options.epochs}", f"--checkpoint-minutes={options.minutes}", "--device=cpu",
            f"--eval-data={options.data}@test", *(f"--student={s}" for s in options.students),
            *options.options,
        ]  # fmt: skip
        whole, again = folder / "whole", folder / "again" / "whole"
        start = time.perf_counter()
        subprocess.run([*command, f"--out={whole}"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        draw, kills, places = random.Random(options.seed), 0, []
        marker = next(whole.glob(f"*/{FILES[1]}")).parent.name
        while not (again / marker / FILES[1]).exists():
            with subprocess.Popen(
                [*command, f"--out={again}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as job:
                while job.poll() is None and not (again / marker / UNFINISHED_METRICS).exists():
                    time.sleep(0.005)
                if kills < options.kills:
                    # a little further each time, so that the run ends
                    time.sleep(draw.uniform(0.2, 3 * seconds / options.kills))
                    job.send_signal(signal.SIGKILL)
                    kills += job.wait() == -signal.SIGKILL
                said, errors = job.communicate()
            if job.returncode not in (0, -signal.SIGKILL):
                raise SystemExit(f"exit {job.returncode}: {errors}")
            places += [line for line in said.splitlines() if line.startswith("going on")]
        files = digests(whole)
        same = files == digests(again)
    print(f"{kills} kills; {len(places)} runs went on from a checkpoint; {machine()}")
    print(f"{len(files)} files of all students, the same to the bit: {same}")
    if not same:
        sys.exit(1)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what a run left, by its place."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in FILES
        for path in sorted(folder.rglob(name))
    }


if __name__ == "__main__":
    main()

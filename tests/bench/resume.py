"""A signal at random times of a training run, each followed by the same command: are the files identical?"""

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
    parser.add_argument(
        "--signal", default="KILL", help="TERM as SLURM sends it, HUP, INT [default: KILL]"
    )
    parser.add_argument("--data", default="idx:data/mnist")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--students", nargs="+", default=["cnn:8,16x2", "mlp:64"])
    parser.add_argument("--options", nargs="*", default=["--ema=0.99", "--extra-augment=cutout:6"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=0.01, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    number = signal.Signals[f"SIG{options.signal}"]
    # a process that has not begun to handle signals ends by them
    stopped = (-number,) if number == signal.SIGKILL else (-number, 128 + number)
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
        # the last folders have the same name, since it is recorded in the settings
        undisturbed, killed = folder / "run", folder / "killed" / "run"
        start = time.perf_counter()
        subprocess.run([*command, f"--out={undisturbed}"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        draw, kills, resumed = random.Random(options.seed), 0, 0
        student = next(undisturbed.glob(f"*/{FILES[1]}")).parent.name
        while not (killed / student / FILES[1]).exists():
            with subprocess.Popen(
                [*command, f"--out={killed}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as job:
                while job.poll() is None and not (killed / student / UNFINISHED_METRICS).exists():
                    time.sleep(0.005)
                if kills < options.kills:
                    # late enough that each attempt gets a little further
                    time.sleep(draw.uniform(0.2, 3 * seconds / options.kills))
                    job.send_signal(number)
                    kills += job.wait() in stopped
                output, errors = job.communicate()
            if job.returncode not in (0, *stopped):
                raise SystemExit(
                    f"softcache train failed with exit code {job.returncode}: {errors}"
                )
            resumed += sum(line.startswith("resuming") for line in output.splitlines())
        files = digests(undisturbed)
        same = files == digests(killed)
    print(f"{kills} kills; {resumed} runs continued from a checkpoint; {machine()}")
    print(f"{len(files)} files of all students, identical to the bit: {same}")
    if not same:
        sys.exit(1)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a run, by their relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in FILES
        for path in sorted(folder.rglob(name))
    }


if __name__ == "__main__":
    main()

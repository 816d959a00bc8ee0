"""One to four processes of a host on one dump: time, bytes, and recovery from a kill.

Each process has one thread. Time is measured from the allocation of the file to its renaming, so that the
start of Python does not count. "blocks in turn" is how softcache distributes work; "equal split" assigns
one run of blocks per view to each process instead. Both are timed with equally fast processes, and with a
teacher that is three times slower in one of two processes. Then one of several processes is killed with
SIGKILL in the middle of the dump, and another number of processes continues it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

from tests.bench import alternate, machine, open_arrays, ratios, spread, work_folder
from tests.bench.dump_overhead import make_weights

WRAPPED = """
import os, sys, time
from softcache.dump import loop
from softcache.cli.app import main
from softcache.teachers.ensemble import Ensemble

log_probs = Ensemble.log_probs

def slow_log_probs(*arguments, **options):
    start = time.perf_counter()
    result = log_probs(*arguments, **options)
    time.sleep(2 * (time.perf_counter() - start))
    return result

if os.environ.get("BENCH_SLOW") == os.environ.get("RANK", "0"):
    Ensemble.log_probs = slow_log_probs
loop.RUNS_OF_A_PROCESS = int(sys.argv.pop(1))
main(prog_name="softcache")
"""
SHARED, EQUAL = 8, 1  # runs of blocks per view and process
WAIT = 0.005  # seconds between checks of the folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", default="resnet:20,16")
    parser.add_argument("--data", default="idx:data/mnist@test")
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    failed = False
    with work_folder(options.folder) as folder:
        (folder / "run.py").write_text(WRAPPED)
        weights = folder / "teacher.safetensors"
        make_weights(options.teacher, open_arrays(options.data), 10, weights)
        job = Job(folder, options)
        times = alternate(
            {str(n): lambda n=n: job.run(n) for n in options.processes},  # type: ignore[misc]
            options.repeats,
        )
        rows = [
            [n, f"{statistics.median(times[n]):.1f}", *spread(ratios(times["1"], times[n]))]
            for n in times
        ]
        print(tabulate(rows, headers=("processes", "s", "speedup", "min", "max")))
        print(f"files identical: {len(job.digests) == 1}; {machine()}\n")

        variants = alternate(
            {
                "blocks in turn": lambda: job.run(2),
                "equal split": lambda: job.run(2, EQUAL),
                "blocks in turn, one is slow": lambda: job.run(2, slow="1"),
                "equal split, one is slow": lambda: job.run(2, EQUAL, slow="1"),
            },
            options.repeats,
        )
        rows = [
            [
                name,
                f"{statistics.median(seconds):.1f}",
                f"{min(seconds):.1f}",
                f"{max(seconds):.1f}",
            ]
            for name, seconds in variants.items()
        ]
        print(tabulate(rows, headers=("two processes", "s", "min", "max")))

        for before, after in ((2, 1), (3, 2), (1, 4)):
            code, partial_bytes = job.kill_one(before, share=0.4)
            job.run(after)
            print(
                f"killed one of {before} ({partial_bytes:,} bytes in the partial file), exit code {code}; "
                f"{after} continued; files identical: {len(job.digests) == 1}"
            )
        failed = len(job.digests) != 1
    if failed:
        sys.exit(1)


class Job:
    """A dump that is run many times.

    Attributes:
        digests: SHA-256 of every finished file.
        seconds: time of the last run with one process.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.out, self.digests, self.seconds = folder / "cache.h5", set[str](), 10.0
        self.program = [str(folder / "run.py")]
        self.arguments = [
            "dump", "--teacher", options.teacher, "--weights", str(folder / "teacher.safetensors"),
            "--data", options.data, "--views", str(options.views), "--classes", "10",
            "--out", str(self.out),
        ]  # fmt: skip
        if options.views > 1:
            self.arguments += ["--augment", "shift:2"]

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    def start(self, processes: int, runs: int, slow: str = "none") -> subprocess.Popen[bytes]:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launch if processes > 1 else [])]
        return subprocess.Popen(
            [*command, *self.program, str(runs), *self.arguments],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), "BENCH_SLOW": slow},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self, processes: int, runs: int = SHARED, *, slow: str = "none") -> float:
        """Run the dump, record the digest of its file and delete it; returns the seconds it took."""
        job = self.start(processes, runs, slow)
        while not self.partial.exists() and not self.out.exists() and job.poll() is None:
            time.sleep(WAIT)
        start = time.perf_counter()
        while not self.out.exists() and job.poll() is None:
            time.sleep(WAIT)
        seconds = time.perf_counter() - start
        if job.wait():
            raise SystemExit(f"{processes} processes failed with exit code {job.returncode}")
        self.digests.add(hashlib.sha256(self.out.read_bytes()).hexdigest())
        self.out.unlink()
        if processes == 1:
            self.seconds = seconds
        return seconds

    def kill_one(self, processes: int, share: float) -> tuple[int, int]:
        """Kill the last process after a share of the dump's usual time.

        Returns:
            The exit code of the job, and the size of the partial file in bytes.
        """
        job = self.start(processes, SHARED)
        while not self.partial.exists():
            time.sleep(WAIT)
        time.sleep(share * self.seconds / processes)
        os.kill(max(descendants(job.pid)) if processes > 1 else job.pid, signal.SIGKILL)
        return job.wait(), self.partial.stat().st_size


def descendants(process: int) -> list[int]:
    """The direct children of a process."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children]


if __name__ == "__main__":
    main()

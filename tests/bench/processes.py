"""One, two, three and four processes of a host on one dump: time, bytes, and what a kill costs.

Each process has one thread. The time is from the allocation of the file to its final name, so that
starting Python does not count. "blocks in turn" is how softcache hands out work; "equal split" gives
each process one run of blocks of a view instead. Both are timed with processes alike, and with a teacher
that is three times as slow in one of two. Then one of several processes is killed with SIGKILL
in the middle, and another number of processes goes on.
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

ask = Ensemble.log_probs

def slow(*arguments, **named):
    start = time.perf_counter()
    found = ask(*arguments, **named)
    time.sleep(2 * (time.perf_counter() - start))
    return found

if os.environ.get("BENCH_SLOW") == os.environ.get("RANK", "0"):
    Ensemble.log_probs = slow
loop.RUNS_OF_A_PROCESS = int(sys.argv.pop(1))
main(prog_name="softcache")
"""
SHARED, EQUAL = 8, 1  # runs of blocks of a view for each process
WAIT = 0.005  # seconds between two looks at the folder


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
        print(tabulate(rows, headers=("processes", "s", "times as fast", "min", "max")))
        print(f"files alike to the byte: {len(job.digests) == 1}; {machine()}\n")

        ways = alternate(
            {
                "blocks in turn": lambda: job.run(2),
                "equal split": lambda: job.run(2, EQUAL),
                "blocks in turn, one is slow": lambda: job.run(2, slow="1"),
                "equal split, one is slow": lambda: job.run(2, EQUAL, slow="1"),
            },
            options.repeats,
        )
        rows = [[name, f"{statistics.median(found):.1f}", f"{min(found):.1f}", f"{max(found):.1f}"]
                for name, found in ways.items()]  # fmt: skip
        print(tabulate(rows, headers=("two processes", "s", "min", "max")))

        for before, after in ((2, 1), (3, 2), (1, 4)):
            code, kept = job.kill_one(before, share=0.4)
            job.run(after)
            print(
                f"killed one of {before} ({kept:,} bytes there), the job's exit {code}; {after} went on; "
                f"the same bytes: {len(job.digests) == 1}"
            )
        failed = len(job.digests) != 1
    if failed:
        sys.exit(1)


class Job:
    """The same dump, again and again."""

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
        """Seconds of the dump; its digest is noted, and the file removed."""
        job = self.start(processes, runs, slow)
        while not self.partial.exists() and not self.out.exists() and job.poll() is None:
            time.sleep(WAIT)
        start = time.perf_counter()
        while not self.out.exists() and job.poll() is None:
            time.sleep(WAIT)
        seconds = time.perf_counter() - start
        if job.wait():
            raise SystemExit(f"{processes} processes: exit {job.returncode}")
        self.digests.add(hashlib.sha256(self.out.read_bytes()).hexdigest())
        self.out.unlink()
        if processes == 1:
            self.seconds = seconds
        return seconds

    def kill_one(self, processes: int, share: float) -> tuple[int, int]:
        """Kill the last process in the middle: the job's exit code, and the bytes that are there."""
        job = self.start(processes, SHARED)
        while not self.partial.exists():
            time.sleep(WAIT)
        time.sleep(share * self.seconds / processes)
        os.kill(max(descendants(job.pid)) if processes > 1 else job.pid, signal.SIGKILL)
        return job.wait(), self.partial.stat().st_size


def descendants(process: int) -> list[int]:
    """The processes that it started itself."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children]


if __name__ == "__main__":
    main()

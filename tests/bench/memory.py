"""A 20 GB cache on a machine with 2 GB of memory: memory and speed of dump, verify and train.

Each command runs in a memory cgroup with --limit, which includes the page cache, so that the file does not
fit into memory; then again without a limit. Reported are the peak of private memory (RssAnon) and of
mapped files (RssFile), and the speed in each quarter of the run. Needs Linux and a writable memory cgroup.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tabulate import tabulate

from softcache.models.build import build
from tests.bench import machine, work_folder

SHAPE = (1, 8, 8)
LINE = re.compile(r": ([\d,]+) of ([\d,]+) \w+ \(\d+%\), ([\d,]+) ")
GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
LIMIT_FILES = "memory.limit_in_bytes", "memory.max"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class Usage:
    """Time and memory of one command."""

    seconds: float = 0.0
    private: int = 0  # peak in bytes
    mapped: int = 0  # peak in bytes
    progress: list[tuple[float, int]] = field(default_factory=list)  # seconds, rows or steps done
    last_line: str = ""

    def quarters(self) -> str:
        """Rows or steps per second in each quarter of the time."""
        if len(self.progress) < 5:
            return "-"
        indices = np.linspace(0, len(self.progress) - 1, 5).astype(int)
        points = [self.progress[index] for index in indices]
        return ", ".join(
            f"{(done - done_before) / max(time - time_before, 1e-9):,.0f}"
            for (time_before, done_before), (time, done) in pairwise(points)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=640_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--limit", type=float, default=2.0, help="memory limit in GB")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--variants", nargs="+", default=["limited", "unlimited"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        random = np.random.default_rng(0)
        inputs = random.integers(0, 256, (options.samples, *SHAPE), dtype=np.uint8)
        labels = random.integers(0, options.classes, options.samples)
        np.savez(folder / "data.npz", x=inputs, y=labels)
        torch.manual_seed(0)
        model = build("mlp:64", input_shape=SHAPE, classes=options.classes)
        save_file(dict(model.state_dict()), folder / "teacher.safetensors")
        common = ["--data", f"npz:{folder / 'data.npz'}"]
        cache = folder / "cache.h5"
        dump = ["dump", "--teacher", "mlp:64", "--weights", str(folder / "teacher.safetensors"),
                "--views", str(options.views), "--augment", "shift:1", "--batch-size", "1024",
                "--out", str(cache), *common]  # fmt: skip
        train = ["train", str(cache), "--student", "mlp:16", "--epochs", str(options.epochs), "--batch-size",
                 "512", "--no-verify", "--out", str(folder / "run"), "--overwrite", *common]  # fmt: skip
        commands = {
            "dump": dump,
            "verify": ["verify", str(cache)],
            "train --no-rotate": [*train, "--no-rotate"],
            "train": train,
        }
        lines = []
        for variant in options.variants:
            for name, arguments in commands.items():
                if name == "dump":
                    cache.unlink(missing_ok=True)
                usage = run_in_cgroup(arguments, options.limit if variant == "limited" else None)
                lines.append(
                    [name, variant, f"{usage.seconds:.0f}", f"{usage.private / 1e6:,.0f}",
                     f"{usage.mapped / 1e6:,.0f}", usage.quarters()]
                )  # fmt: skip
                print(f"{variant}, {name}: {usage.seconds:.0f} s; {usage.last_line}", flush=True)
        size = cache.stat().st_size
    headers = ("command", "memory", "s", "private MB", "mapped MB", "per second, by quarter")
    print(f"\n{size / 1e9:.1f} GB, limit {options.limit:g} GB; {machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def run_in_cgroup(arguments: list[str], limit: float | None) -> Usage:
    """Run softcache in a memory cgroup with a limit in GB, and measure its memory while it runs."""
    usage, start = Usage(), time.perf_counter()
    group = make_group(limit)

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-m", "softcache", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          preexec_fn=enter) as process:  # fmt: skip
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        while process.poll() is None:
            time.sleep(0.2)
            private, mapped = memory_of(process.pid)
            usage.private, usage.mapped = max(usage.private, private), max(usage.mapped, mapped)
            for line in (process.stderr.read() or b"").decode().splitlines():
                usage.last_line = line
                if match := LINE.search(line):
                    done = int(match[1].replace(",", ""))
                    usage.progress.append((time.perf_counter() - start, done))
    usage.seconds = time.perf_counter() - start
    group.rmdir()
    if process.returncode:
        raise SystemExit(
            f"softcache {arguments[0]} failed with exit code {process.returncode}; {usage.last_line}"
        )
    return usage


def make_group(limit: float | None) -> Path:
    """Make a memory cgroup with a limit in GB, after dropping the page cache if that is allowed."""
    os.sync()
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("3")
    root = next((root for root in GROUPS if os.access(root, os.W_OK)), None)
    if root is None:
        raise SystemExit("no writable memory cgroup; run this as root, on Linux")
    group = root / f"softcache-{os.getpid()}"
    group.mkdir(exist_ok=True)
    if limit is not None:
        name = next(name for name in LIMIT_FILES if (group / name).exists())
        (group / name).write_text(str(int(limit * 1e9)))
    return group


def memory_of(process: int) -> tuple[int, int]:
    """Resident bytes of a process: private memory, and mapped files."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    sizes = dict(re.findall(r"^Rss(Anon|File):\s+(\d+) kB", text, re.MULTILINE))
    return 1024 * int(sizes.get("Anon", 0)), 1024 * int(sizes.get("File", 0))


if __name__ == "__main__":
    main()

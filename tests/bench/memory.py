"""A cache of 20 GB on a machine of 2 GB: memory and speed of dump, verify and train.

Each command runs in a memory cgroup of --limit, whose page cache counts too, so that the file cannot
hide in memory; then once more without a limit. Shown are the most memory of its own (RssAnon) and of
mapped files (RssFile) that a process had, and its speed in each quarter of its rows or steps. Needs
Linux and a memory cgroup that can be written.
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
DROPPED = Path("/proc/sys/vm/drop_caches")


@dataclass
class Found:
    """What one command came to."""

    seconds: float = 0.0
    own: int = 0  # bytes, the most
    mapped: int = 0
    progress: list[tuple[float, int]] = field(default_factory=list)  # when, how far
    last: str = ""

    def quarters(self) -> str:
        """Rows or steps per second in each quarter of the time."""
        if len(self.progress) < 5:
            return "-"
        at = np.linspace(0, len(self.progress) - 1, 5).astype(int)
        points = [self.progress[i] for i in at]
        return ", ".join(
            f"{(b[1] - a[1]) / max(b[0] - a[0], 1e-9):,.0f}" for a, b in pairwise(points)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=640_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--limit", type=float, default=2.0, help="GB")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["limited", "unlimited"])
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
        for way in options.ways:
            for name, arguments in commands.items():
                if name == "dump":
                    cache.unlink(missing_ok=True)
                found = watched(arguments, options.limit if way == "limited" else None)
                lines.append(
                    [name, way, f"{found.seconds:.0f}", f"{found.own / 1e6:,.0f}",
                     f"{found.mapped / 1e6:,.0f}", found.quarters()]
                )  # fmt: skip
                print(f"{way}, {name}: {found.seconds:.0f} s; {found.last}", flush=True)
        size = cache.stat().st_size
    headers = ("command", "memory", "s", "own MB", "mapped MB", "per second, by quarter")
    print(f"\n{size / 1e9:.1f} GB, limit {options.limit:g} GB; {machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def watched(arguments: list[str], limit: float | None) -> Found:
    """Run softcache in a memory cgroup, and look at it while it runs."""
    found, start = Found(), time.perf_counter()
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
            own, mapped = memory_of(process.pid)
            found.own, found.mapped = max(found.own, own), max(found.mapped, mapped)
            for line in (process.stderr.read() or b"").decode().splitlines():
                found.last = line
                if match := LINE.search(line):
                    done = int(match[1].replace(",", ""))
                    found.progress.append((time.perf_counter() - start, done))
    found.seconds = time.perf_counter() - start
    group.rmdir()
    if process.returncode:
        raise SystemExit(f"softcache {arguments[0]}: exit {process.returncode}; {found.last}")
    return found


def make_group(limit: float | None) -> Path:
    """A new memory cgroup; the page cache is emptied first, where that is allowed."""
    os.sync()
    if os.access(DROPPED, os.W_OK):
        DROPPED.write_text("3")
    root = next((root for root in GROUPS if os.access(root, os.W_OK)), None)
    if root is None:
        raise SystemExit("no memory cgroup can be written here; run as root, on Linux")
    group = root / f"softcache-{os.getpid()}"
    group.mkdir(exist_ok=True)
    if limit is not None:
        name = next(name for name in LIMIT_FILES if (group / name).exists())
        (group / name).write_text(str(int(limit * 1e9)))
    return group


def memory_of(process: int) -> tuple[int, int]:
    """Bytes of its own, and of mapped files, that are in memory now."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    sizes = dict(re.findall(r"^Rss(Anon|File):\s+(\d+) kB", text, re.MULTILINE))
    return 1024 * int(sizes.get("Anon", 0)), 1024 * int(sizes.get("File", 0))


if __name__ == "__main__":
    main()

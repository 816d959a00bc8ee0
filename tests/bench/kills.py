"""A signal at random times of a dump: no committed block may be lost, and the file must be the same.

A slowed-down `softcache dump` is killed and run again, many times, and then left to finish. Every fifth
kill happens at any time after the start of the process, the others during its loop. A block counts as lost
if its digest has disappeared or changed since it was first seen, or if its bytes do not match it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from softcache.cache import Cache, open_cache
from softcache.cache.reader import partial_path
from softcache.errors import FormatError
from softcache.models.weights import file_sha256
from tests.bench import machine, work_folder

CLASSES, SIDE, BATCH = 1000, 8, 256
START_LIMIT = 120.0  # seconds within which a process must enter its loop
DELAY = "BENCH_DELAY"  # environment variable: seconds that the teacher sleeps for every batch

TEACHER = f'''
import os, time
import torch
from torch import nn

class Slow(nn.Linear):
    def forward(self, inputs):
        time.sleep(float(os.environ.get("{DELAY}", "0")))
        return super().forward(inputs.flatten(1))

def teacher():
    torch.manual_seed(7)
    return Slow({SIDE * SIDE}, {CLASSES})
'''

Blocks = dict[tuple[int | None, int], int]  # (view, or None for labels and keys; block) -> digest


@dataclass(frozen=True)
class Dump:
    """A command line of `softcache dump` that is run many times."""

    folder: Path
    out: Path
    views: int

    def start(self, delay: float) -> subprocess.Popen[bytes]:
        """Start the dump with a teacher that sleeps `delay` seconds for every batch."""
        command = (
            f"dump --teacher {self.folder / 'slow.py'}:teacher --data npz:{self.folder / 'data.npz'} "
            f"--temperature 4 --views {self.views} --augment shift:1 --batch-size {BATCH} "
            f"--device cpu --out {self.out}"
        ).split()
        environment = os.environ | {DELAY: str(delay), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "softcache", *command],
                stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def finish(self, delay: float) -> None:
        """Run the dump to its end; exit with its output if it fails."""
        if self.start(delay).wait():
            raise SystemExit(f"the dump failed:\n{self.log.read_text()}")

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    @property
    def partial(self) -> Path:
        return partial_path(self.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--signal", default="KILL", help="TERM as SLURM sends it, HUP, INT [default: KILL]"
    )
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=40, help="duration of the slowed-down loop"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--folder", type=Path, help="folder for caches [default: a temporary one]")
    options = parser.parse_args()
    draw, number = random.Random(options.seed), signal.Signals[f"SIG{options.signal}"]
    with work_folder(options.folder) as folder:
        write_inputs(folder, options.samples)
        reference = Dump(folder, folder / "reference.h5", options.views)
        reference.out.unlink(missing_ok=True)
        reference.finish(delay=0)
        self_check(reference, folder / "damaged.h5")

        killed = Dump(folder, folder / "killed.h5", options.views)
        for path in (killed.out, killed.partial):
            path.unlink(missing_ok=True)
        delay = options.seconds / (options.views * -(-options.samples // BATCH))
        lines: list[tuple[object, ...]] = []
        dumps, same = 1, True
        seen: Blocks = {}
        startup = 0.0  # seconds that the last process took to enter its loop
        total_lost = 0
        while len(lines) < options.kills:
            in_loop = len(lines) % 5 != 4
            longest = 2 * options.seconds / options.kills
            wait = draw.uniform(0, longest if in_loop else startup + longest)
            process, start = killed.start(delay), time.monotonic()
            if in_loop:
                await_loop(process, killed)
                startup = time.monotonic() - start
            time.sleep(wait)
            before = committed(killed.partial)
            process.send_signal(number)
            code = process.wait()
            # a process that has not begun to handle signals ends by them
            if code not in (0, -number, *([] if number == signal.SIGKILL else [128 + number])):
                raise SystemExit(f"the dump failed:\n{killed.log.read_text()}")
            if code == 0:  # it finished before the kill; start another dump for the remaining kills
                same &= file_sha256(killed.out) == file_sha256(reference.out)
                total_lost += len(lost(killed.out, seen))
                killed.out.unlink()
                seen, dumps = {}, dumps + 1
                continue
            seconds = time.monotonic() - start
            seen |= before
            after = committed(killed.partial)
            lost_blocks = lost(killed.partial, seen)
            seen |= after
            total_lost += len(lost_blocks)
            phase = "loop" if in_loop else "any"
            line = (
                len(lines) + 1, phase, f"{seconds:.2f}", len(before), len(after), len(lost_blocks)
            )  # fmt: skip
            lines.append(line)
            print(
                "kill {}: {} after {} s, blocks {} before, {} after, {} lost".format(*line),
                flush=True,
            )
        killed.finish(delay=0)
        total = len(committed(killed.out))
        total_lost += len(lost(killed.out, seen))
        digests = {
            name: file_sha256(dump.out)
            for name, dump in (("not interrupted", reference), ("killed", killed))
        }
        size = killed.out.stat().st_size

    print(
        f"\n{options.kills} kills of {dumps} dump(s) of {total} blocks, {size:,} bytes; {machine()}"
    )
    headers = ("kill", "phase", "after s", "blocks before", "blocks after", "lost")
    print(tabulate(lines, headers=headers, disable_numparse=True))
    print(f"\nblocks lost: {total_lost}")
    print(tabulate(digests.items(), headers=("dump", "sha256 of the file")))
    if total_lost or not same or len(set(digests.values())) > 1:
        raise SystemExit("blocks were lost, or the files differ")


def write_inputs(folder: Path, samples: int) -> None:
    """Write a data set of noise, and a teacher that can be slowed down."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (samples, 1, SIDE, SIDE), dtype=np.uint8)
    np.savez(folder / "data.npz", x=images, y=numbers.integers(0, CLASSES, samples))
    (folder / "slow.py").write_text(TEACHER)


def await_loop(process: subprocess.Popen[bytes], dump: Dump) -> None:
    """Wait until the process fills an unfinished file, which it has created or continues."""
    resumed = dump.partial.exists()
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if (b"resuming" in dump.log.read_bytes()) if resumed else dump.partial.exists():
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    raise SystemExit(f"the dump did not start; it printed:\n{dump.log.read_text()}")


def committed(path: Path) -> Blocks:
    """The digest of every committed block; empty if there is no file yet."""
    try:
        cache = open_cache(path, unfinished=True)
    except FormatError:
        if path.exists():
            raise
        return {}
    return {block: digest for block, digest in stored_digests(cache).items() if digest}


def stored_digests(cache: Cache) -> Blocks:
    """The digest of every block, 0 for missing ones."""
    digests: Blocks = {}
    for view in range(cache.header.views):
        for block in range(cache.header.blocks):
            digests[view, block] = int(cache.arrays["digests"][view, block])
    for block in range(cache.header.blocks):
        digests[None, block] = int(cache.arrays["sample_digests"][block])
    return digests


def lost(path: Path, seen: Blocks) -> list[tuple[int | None, int]]:
    """The blocks that were seen as committed, and have disappeared or changed."""
    if not path.exists():
        return list(seen)
    cache = open_cache(path, unfinished=True)
    stored = stored_digests(cache)
    return [
        (view, block)
        for (view, block), digest in seen.items()
        if stored[view, block] != digest
        or digest != (
            cache.sample_digest(block) if view is None else cache.block_digest(view, block)
        )
    ]  # fmt: skip


def self_check(reference: Dump, copy: Path) -> None:
    """Stop unless lost() notices a deleted digest and a flipped bit."""
    seen = committed(reference.out)
    header = open_cache(reference.out).header
    for name in ("digests", "log_probs"):
        raw = bytearray(reference.out.read_bytes())
        offset = header.array(name).offset
        if name == "digests":
            raw[offset : offset + 8] = bytes(8)
        else:
            raw[offset + 5] ^= 1
        copy.write_bytes(raw)
        if lost(copy, seen) != [(0, 0)]:
            raise SystemExit(
                f"lost() does not notice damage to {name}; this benchmark shows nothing"
            )
    copy.unlink()


if __name__ == "__main__":
    main()

"""kill -9 at random times of one dump: no committed block is lost, the file comes out the same.

A slowed-down `softcache dump` is killed and run again, time after time, then left to finish. Every
fifth kill falls anywhere from the start of the process on, the others fall into its loop. A block
counts as lost if a digest that was seen once is gone or another, or if its bytes do not match it.
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
START_LIMIT = 120.0  # seconds in which a process must have begun its loop
DELAY = "BENCH_DELAY"  # environment variable: seconds that the teacher sleeps in every batch

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

Blocks = dict[tuple[int | None, int], int]  # (view, block) -> digest; view None: labels and keys


@dataclass(frozen=True)
class Dump:
    """One command line of `softcache dump`, to be run again and again."""

    folder: Path
    out: Path
    views: int

    def start(self, delay: float) -> subprocess.Popen[bytes]:
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
        """Run to the end; stop with what the dump printed if it fails."""
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
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40, help="of the slowed-down loop")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--folder", type=Path, help="where caches go [default: a temporary folder]")
    options = parser.parse_args()
    draw = random.Random(options.seed)
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
        known: Blocks = {}
        startup = 0.0  # seconds until a process begins its loop, as the last one took
        lost_in_all = 0
        while len(lines) < options.kills:
            in_loop = len(lines) % 5 != 4
            longest = 2 * options.seconds / options.kills
            wait = draw.uniform(0, longest if in_loop else startup + longest)
            process, begun = killed.start(delay), time.monotonic()
            if in_loop:
                await_loop(process, killed)
                startup = time.monotonic() - begun
            time.sleep(wait)
            before = committed(killed.partial)
            process.kill()
            code = process.wait()
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"the dump failed:\n{killed.log.read_text()}")
            if code == 0:  # it was done before: another one gives the other kills
                same &= file_sha256(killed.out) == file_sha256(reference.out)
                lost_in_all += len(lost(killed.out, known))
                killed.out.unlink()
                known, dumps = {}, dumps + 1
                continue
            at = time.monotonic() - begun
            known |= before
            after = committed(killed.partial)
            gone = lost(killed.partial, known)
            known |= after
            lost_in_all += len(gone)
            place = "loop" if in_loop else "any"
            line = (len(lines) + 1, place, f"{at:.2f}", len(before), len(after), len(gone))
            lines.append(line)
            print(
                "kill {}: {} after {} s, blocks {} before, {} after, {} lost".format(*line),
                flush=True,
            )
        killed.finish(delay=0)
        total = len(committed(killed.out))
        lost_in_all += len(lost(killed.out, known))
        digests = {name: file_sha256(dump.out) for name, dump in
                   (("not interrupted", reference), ("killed", killed))}  # fmt: skip
        size = killed.out.stat().st_size

    print(
        f"\n{options.kills} kills of {dumps} dump(s) of {total} blocks, {size:,} bytes; {machine()}"
    )
    headers = ("kill", "falls into", "after s", "blocks before", "blocks after", "lost")
    print(tabulate(lines, headers=headers, disable_numparse=True))
    print(f"\nblocks lost: {lost_in_all}")
    print(tabulate(digests.items(), headers=("dump", "sha256 of the file")))
    if lost_in_all or not same or len(set(digests.values())) > 1:
        raise SystemExit("blocks were lost, or the files differ")


def write_inputs(folder: Path, samples: int) -> None:
    """A data set of noise and a teacher that can be slowed down."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (samples, 1, SIDE, SIDE), dtype=np.uint8)
    np.savez(folder / "data.npz", x=images, y=numbers.integers(0, CLASSES, samples))
    (folder / "slow.py").write_text(TEACHER)


def await_loop(process: subprocess.Popen[bytes], dump: Dump) -> None:
    """Return once the process has an unfinished file to fill, its own or one it goes on with."""
    resumed = dump.partial.exists()
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if (b"going on with" in dump.log.read_bytes()) if resumed else dump.partial.exists():
            return
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    raise SystemExit(f"the dump did not begin; it printed:\n{dump.log.read_text()}")


def committed(path: Path) -> Blocks:
    """The digest of every committed block; nothing if there is no file yet."""
    try:
        cache = open_cache(path, unfinished=True)
    except FormatError:
        if path.exists():
            raise
        return {}
    return {place: digest for place, digest in stored_digests(cache).items() if digest}


def stored_digests(cache: Cache) -> Blocks:
    digests: Blocks = {}
    for view in range(cache.header.views):
        for block in range(cache.header.blocks):
            digests[view, block] = int(cache.arrays["digests"][view, block])
    for block in range(cache.header.blocks):
        digests[None, block] = int(cache.arrays["sample_digests"][block])
    return digests


def lost(path: Path, known: Blocks) -> list[tuple[int | None, int]]:
    """Which of the blocks once seen as committed are not what they were."""
    if not path.exists():
        return list(known)
    cache = open_cache(path, unfinished=True)
    stored = stored_digests(cache)
    return [
        (view, block)
        for (view, block), digest in known.items()
        if stored[view, block] != digest
        or digest != (
            cache.sample_digest(block) if view is None else cache.block_digest(view, block)
        )
    ]  # fmt: skip


def self_check(reference: Dump, copy: Path) -> None:
    """Stop unless lost() notices a digest that is gone and a bit that is flipped."""
    known = committed(reference.out)
    header = open_cache(reference.out).header
    for name, where in (("digests", 0), ("log_probs", 5)):
        raw = bytearray(reference.out.read_bytes())
        at = header.array(name).offset + where
        raw[at : at + 8] = (
            bytes(8) if name == "digests" else bytes([raw[at] ^ 1]) + raw[at + 1 : at + 8]
        )
        copy.write_bytes(raw)
        if lost(copy, known) != [(0, 0)]:
            raise SystemExit(
                f"lost() does not notice damage to {name}; this benchmark shows nothing"
            )
    copy.unlink()


if __name__ == "__main__":
    main()

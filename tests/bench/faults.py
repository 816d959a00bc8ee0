"""A dump that is killed, or whose disk fails, at chosen system calls must lose no committed block.

A small `softcache dump` with many blocks runs in a child process that counts its calls of os.pwrite,
fdatasync, fsync, replace and posix_fallocate. Each time from the beginning, one of these happens:

    kill        SIGKILL right after a call, from the first one of the creation to the last
    EIO         an input/output error at one pwrite
    ENOSPC      "no space left" at one pwrite or at the allocation, and at all that follow
    sync        an input/output error at one fdatasync or fsync, and all writes since the previous sync
                are undone, as a disk loses data that it could not write and reports it once
    limit       RLIMIT_FSIZE at a size between 0 and the size of the file
    limit, on   the same, while a dump that was killed half-way is continued

Then the same command is run again. After the fault, the file must open and every committed block must
match its digest. A fault must end in exit code 1 and one line on stderr that names the error and what to
do. The second run must not rewrite committed blocks, must complete the file, leave no other file behind,
and write the same bytes as an undisturbed dump. For kills at random times, see tests.bench.kills.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import signal
import stat
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from softcache.cache import Header, allocate, open_cache, writer
from softcache.cache.header import PREAMBLE
from softcache.cache.reader import partial_path
from softcache.cache.verify import find_damage
from softcache.cli.app import main as softcache
from softcache.errors import FormatError
from tests.bench import machine, work_folder
from tests.bench.corruptions import AUGMENT, VIEWS, block_places, write_inputs

BLOCK_BYTES = 200
BATCH = 16
SYNCS = ("fdatasync", "fsync")
WATCHED = ("pwrite", *SYNCS, "replace", "posix_fallocate")
PROBLEMS = ("lost", "damage", "ending", "message", "second run", "differs")
MODES = ("kill", "EIO", "ENOSPC", "sync", "limit", "limit, on")

Block = tuple[int | None, int]  # view (None for labels and keys), and number of the block


@dataclass(frozen=True)
class Call:
    """A system call of the dump."""

    name: str
    offset: int = 0  # for pwrite
    size: int = 0  # for pwrite


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        mode: one of MODES.
        position: the number of the call, counted from 1 over all WATCHED calls; for limits, a size in bytes.
    """

    mode: str
    position: int


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int  # exit code, or minus the signal
    output: str
    calls: list[Call]  # empty if it was killed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="spread over the calls of the dump")
    parser.add_argument("--faults", type=int, help="faults per other mode [default: at every call]")
    parser.add_argument("--limits", type=int, default=25, help="sizes for each of the two limits")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--encoding", default="basis:8,4", help="as in softcache dump")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls that are drawn")
    parser.add_argument("--folder", type=Path, help="folder for caches [default: a temporary one]")
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        teacher, data = write_inputs(folder)
        command = (
            f"dump --teacher {teacher} --data {data} --encoding {options.encoding} --temperature 4 "
            f"--views {VIEWS} --augment {AUGMENT} --batch-size {BATCH} --device cpu"
        ).split()
        (folder / "reference").mkdir(exist_ok=True)
        reference = folder / "reference" / "cache.h5"
        reference.unlink(missing_ok=True)
        undisturbed = run([*command, "--out", str(reference)], None)
        if undisturbed.code:
            raise SystemExit(f"the dump fails without any fault:\n{undisturbed.output}")
        calls = undisturbed.calls
        header = open_cache(reference).header
        kinds = [kind_of(call, header) for call in calls]
        written_end = max(array.offset + array.nbytes for array in header.arrays)
        self_check(reference)
        lines: list[tuple[str, ...]] = []
        failures: list[str] = []
        for mode in options.modes:
            faults = choose(mode, kinds, options, written_end)
            problem_counts = Counter[str]()
            committed_blocks = 0
            for fault in faults:
                blocks, problems = try_fault(fault, command, reference, folder / "faulty", calls)
                committed_blocks += blocks
                problem_counts.update({problem.partition(":")[0] for problem in problems})
                failures += [f"{describe(fault, kinds)}: {problem}" for problem in problems]
            counts = (str(problem_counts[kind]) for kind in PROBLEMS)
            lines.append((mode, str(len(faults)), str(committed_blocks), *counts))
            print(f"{mode}: done", file=sys.stderr, flush=True)
    print(
        f"{len(calls)} calls of one dump of {header.file_bytes:,} bytes, {options.encoding}, "
        f"{header.blocks * (header.views + 1)} blocks: "
        + ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
        + f"; {machine()}\n"
    )
    headers = ("mode", "faults", "committed blocks", *PROBLEMS)
    print(tabulate(lines, headers=headers, disable_numparse=True))
    if failures:
        more = [f"and {len(failures) - 30} more"] if len(failures) > 30 else []
        raise SystemExit("\n".join(["", *failures[:30], *more]))
    print("\nno committed block was lost, and every dump wrote the same bytes")


def describe(fault: Fault, kinds: Sequence[str]) -> str:
    if fault.mode.startswith("limit"):
        return f"{fault.mode} at {fault.position:,} bytes"
    kind = kinds[fault.position - 1]
    return f"{fault.mode} at call {fault.position} of {len(kinds)}, {kind}"


def choose(
    mode: str, kinds: Sequence[str], options: argparse.Namespace, written_end: int
) -> list[Fault]:
    """The faults of a mode: at the first and the last call of each kind, and at others drawn at random."""
    draw = random.Random(f"{options.seed} {mode}")
    if mode.startswith("limit"):
        edges = [0, 1, written_end // 2, written_end - 1]
        sizes = edges[: options.limits] + [
            draw.randrange(written_end) for _ in range(options.limits - len(edges))
        ]
        return [Fault(mode, size) for size in sorted(sizes)]
    possible = [number for number, kind in enumerate(kinds, 1) if strikes(mode, kind)]
    count = options.kills if mode == "kill" else options.faults
    if count is None or count >= len(possible):
        return [Fault(mode, number) for number in possible]
    numbered = [(number, kind) for number, kind in enumerate(kinds, 1) if number in possible]
    first = {kind: number for number, kind in reversed(numbered)}
    last = {kind: number for number, kind in numbered}
    fixed = sorted({*first.values(), *last.values()})
    rest = [number for number in possible if number not in fixed]
    if count < len(fixed):
        fixed = draw.sample(fixed, count)
    drawn = draw.sample(rest, count - len(fixed))
    return [Fault(mode, number) for number in sorted([*fixed, *drawn])]


def strikes(mode: str, kind: str) -> bool:
    """Whether a fault of this mode can happen at a call of this kind."""
    sync, write = kind in SYNCS, kind not in (*SYNCS, "replace", "posix_fallocate")
    return {"kill": True, "EIO": write, "sync": sync}.get(mode, write or kind == "posix_fallocate")


def try_fault(
    fault: Fault, command: Sequence[str], reference: Path, folder: Path, calls: Sequence[Call]
) -> tuple[int, list[str]]:
    """How many blocks were committed when the fault happened, and what went wrong."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    out = folder / reference.name
    command = [*command, "--out", str(out)]
    if fault.mode == "limit, on":
        run(command, Fault("kill", len(calls) // 2))
    ended = run(command, fault)
    problems = check_ending(fault, ended)
    header = open_cache(reference).header
    committed_blocks, damage = committed(out, reference)
    problems += damage

    second = run(command, None)
    if second.code:
        problems.append(f"second run: exit code {second.code}, {second.output.strip()[-300:]}")
    offsets = [call.offset for call in second.calls if call.name == "pwrite"]
    for view, block in committed_blocks:
        places = block_places(header, view, block)
        if any(offset in place for offset in offsets for place in places):
            problems.append(f"lost: block {block} of view {view} was written again")
    files = sorted(file.name for file in folder.iterdir())
    if files != [out.name]:
        problems.append(f"second run: left {', '.join(files)}")
    if not out.exists() or out.read_bytes() != reference.read_bytes():
        problems.append("differs: the file is not the same as that of an undisturbed dump")
    return len(committed_blocks), problems


def check_ending(fault: Fault, ended: Ended) -> list[str]:
    """Problems with how the run ended: its exit code or its message."""
    if fault.mode == "kill":
        return [] if ended.code == -signal.SIGKILL else [f"ending: {ended.code}, expected a kill"]
    if ended.code != 1:
        return [f"ending: exit code {ended.code}, expected 1; {ended.output.strip()[-300:]}"]
    error = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "sync": errno.EIO}.get(
        fault.mode, errno.EFBIG
    )
    *_, last_line = ended.output.strip().split("\n")
    is_good = (
        last_line.startswith("Error: ")
        and ended.output.count("Error") == 1
        and os.strerror(error) in last_line
        and "run the same command" in last_line
    )
    return [] if is_good else [f"message: {ended.output.strip()[-400:]!r}"]


def committed(out: Path, reference: Path) -> tuple[list[Block], list[str]]:
    """The blocks that have the digest of the reference, and problems with the file."""
    path = out if out.exists() else partial_path(out)
    if not path.exists():
        return [], []
    try:
        cache = open_cache(path, unfinished=True)
    except FormatError as error:
        return [], [f"damage: it does not open: {error}"]
    header, expected = cache.header, open_cache(reference).arrays
    # a digest that was written in part, which only happens on a full disk, commits nothing
    blocks: list[Block] = [
        (view, int(block))
        for view in (None, *range(header.views))
        for name, index in [("sample_digests", ()) if view is None else ("digests", (view,))]
        for block in np.flatnonzero(cache.arrays[name][index] == expected[name][index])
    ]
    problems = []
    for part in find_damage(cache):
        if part.samples is None:
            problems.append(f"damage: {part}")
        elif (part.view, part.samples.start // header.block_rows) in blocks:
            problems.append(f"lost: {part}")
    return blocks, problems


def kind_of(call: Call, header: Header) -> str:
    """What a call writes, as a name for the tables."""
    if call.name != "pwrite":
        return call.name
    if call.offset < header.user_block:
        front = {0: "preamble", PREAMBLE.size: "final header"}
        is_zeros = call.size == header.user_block // 2
        return front.get(call.offset, "zeros" if is_zeros else "first header")
    array = next(a for a in header.arrays if a.offset <= call.offset < a.offset + a.nbytes)
    return f"{'digest of' if array.axis == 'commits' else 'values of'} {array.name}"


# the child


class Disk:
    """Sits between the dump and the system: records its calls, and makes one of them fail."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.calls: list[Call] = []
        self._unsynced: list[tuple[int, int, bytes]] = []  # file, offset, bytes before the write
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in WATCHED}

    def install(self) -> None:
        for name in WATCHED:
            setattr(os, name, self._wrapper(name))

    def _wrapper(self, name: str) -> Callable[..., object]:
        def call(*arguments: Any, **options: Any) -> object:
            place = (arguments[2], len(arguments[1])) if name == "pwrite" else (0, 0)
            self.calls.append(Call(name, *place))
            self._fail(name, arguments)
            if name == "pwrite":
                file, values, offset = arguments
                self._unsynced.append((file, offset, os.pread(file, len(values), offset)))
            elif name in SYNCS:
                self._unsynced.clear()
            result = self._real[name](*arguments, **options)
            if self.fault == Fault("kill", len(self.calls)):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def _fail(self, name: str, arguments: Sequence[Any]) -> None:
        number = len(self.calls)
        match self.fault:
            case Fault("EIO", position) if number == position:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case Fault("ENOSPC", position) if number >= position and name in (
                "pwrite",
                "posix_fallocate",
            ):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case Fault("sync", position) if number == position:
                if not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                    for file, offset, before in reversed(self._unsynced):
                        self._real["pwrite"](file, before, offset)
                self._unsynced.clear()
                raise OSError(errno.EIO, os.strerror(errno.EIO))


def run(command: Sequence[str], fault: Fault | None) -> Ended:
    """Run softcache in a fork of this process, which has already imported torch."""
    sys.stdout.flush()
    sys.stderr.flush()
    output_pipe, calls_pipe = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(output_pipe[0])
        os.close(calls_pipe[0])
        _child(command, fault, output_pipe[1], calls_pipe[1])
    os.close(output_pipe[1])
    os.close(calls_pipe[1])
    with os.fdopen(output_pipe[0], errors="replace") as pipe:
        output = pipe.read()
    with os.fdopen(calls_pipe[0]) as pipe:
        calls = [Call(*fields) for fields in json.loads(pipe.read() or "[]")]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, output, calls)


def _child(command: Sequence[str], fault: Fault | None, output: int, calls: int) -> None:
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        # when blocks are committed must depend on what was written, not on how long it took
        allocate.BLOCK_BYTES, writer.COMMIT_SECONDS = BLOCK_BYTES, 0.0
        disk = Disk(fault)
        disk.install()
        if fault is not None and fault.mode.startswith("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.position, fault.position))
        try:
            softcache.main([*command], prog_name="softcache")
        except SystemExit as stop:
            code = int(stop.code or 0)
        with os.fdopen(calls, "w") as pipe:
            json.dump([(c.name, c.offset, c.size) for c in disk.calls], pipe)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def self_check(reference: Path) -> None:
    """Stop unless committed() notices a lost block."""
    copy = reference.with_name("checked.h5")
    raw = bytearray(reference.read_bytes())
    header = open_cache(reference).header
    raw[block_places(header, 1, 2)[0].start] ^= 1
    copy.write_bytes(raw)
    blocks, problems = committed(copy, reference)
    copy.unlink()
    samples = header.block_range(2)
    expected = [f"lost: soft targets of samples {samples.start} to {samples.stop - 1} in view 1"]
    if problems != expected or len(blocks) != header.blocks * (header.views + 1):
        raise SystemExit("committed() does not notice a lost block; this benchmark shows nothing")


if __name__ == "__main__":
    main()

"""A dump that is killed, or whose disk fails, at chosen calls: nothing committed is lost.

A small `softcache dump` with many blocks is run in a child process whose os.pwrite, fdatasync, fsync,
replace and posix_fallocate count their calls. It is, each time from the beginning,

    kill        killed with SIGKILL right after a call, from the first of the creation to the last
    EIO         given an input/output error at one pwrite
    ENOSPC      given "no space left" at one pwrite, or at the allocation, and at all that follow
    sync        given an input/output error at one fdatasync or fsync, and what was written since the
                one before is as it was: so a disk loses what it could not write, and says so once
    limit       run with RLIMIT_FSIZE at a size from 0 to that of the file, or
    limit, on   the same, going on with a dump that was killed half-way

Then the same command is run again. After the fault, every committed block must match its digest and
the file must open; a fault must end in one line on stderr that names the error and what to do, and
exit code 1; the second run must leave committed blocks alone, complete the file, leave no other file
behind, and come to the same bytes as a dump that nothing disturbed. Kills at random times: see kills.
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

Block = tuple[int | None, int]  # view (None: labels and keys) and number


@dataclass(frozen=True)
class Call:
    """A call that the dump made; offset and size of a pwrite."""

    name: str
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Fault:
    """What happens at call `at`, counted from 1 over the calls of WATCHED; for limits, bytes."""

    mode: str
    at: int


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code, or minus the signal; what it printed, and its calls if it lived."""

    code: int
    output: str
    calls: list[Call]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="spread over the calls of the dump")
    parser.add_argument("--faults", type=int, help="of each other mode [default: at every call]")
    parser.add_argument("--limits", type=int, default=25, help="sizes, for each of the two modes")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--encoding", default="basis:8,4", help="as in softcache dump")
    parser.add_argument("--seed", type=int, default=0, help="of the calls that are chosen")
    parser.add_argument("--folder", type=Path, help="where caches go [default: a temporary folder]")
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
        reach = max(array.offset + array.nbytes for array in header.arrays)  # of what is written
        self_check(reference)
        lines: list[tuple[str, ...]] = []
        failures: list[str] = []
        for mode in options.modes:
            faults = choose(mode, kinds, options, reach)
            broken = Counter[str]()
            committed = 0
            for fault in faults:
                blocks, problems = try_fault(fault, command, reference, folder / "faulty", calls)
                committed += blocks
                broken.update({problem.partition(":")[0] for problem in problems})
                failures += [f"{describe(fault, kinds)}: {problem}" for problem in problems]
            lines.append(
                (mode, str(len(faults)), str(committed), *(str(broken[p]) for p in PROBLEMS))
            )
            print(f"{mode}: done", file=sys.stderr, flush=True)
    print(
        f"{len(calls)} calls of one dump of {header.file_bytes:,} bytes, {options.encoding}, "
        f"{header.blocks * (header.views + 1)} blocks: "
        + ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
        + f"; {machine()}\n"
    )
    headers = ("mode", "faults", "blocks committed before", *PROBLEMS)
    print(tabulate(lines, headers=headers, disable_numparse=True))
    if failures:
        more = [f"and {len(failures) - 30} more"] if len(failures) > 30 else []
        raise SystemExit("\n".join(["", *failures[:30], *more]))
    print("\nno committed block was lost, and every dump came to the same bytes")


def describe(fault: Fault, kinds: Sequence[str]) -> str:
    if fault.mode.startswith("limit"):
        return f"{fault.mode} at {fault.at:,} bytes"
    return f"{fault.mode} at call {fault.at} of {len(kinds)}, {kinds[fault.at - 1]}"


def choose(mode: str, kinds: Sequence[str], options: argparse.Namespace, reach: int) -> list[Fault]:
    """Where faults strike: at the first and the last call of each kind, and at others drawn."""
    draw = random.Random(f"{options.seed} {mode}")
    if mode.startswith("limit"):
        edges = [0, 1, reach // 2, reach - 1]
        sizes = edges[: options.limits] + [
            draw.randrange(reach) for _ in range(options.limits - len(edges))
        ]
        return [Fault(mode, size) for size in sorted(sizes)]
    possible = [at for at, kind in enumerate(kinds, 1) if strikes(mode, kind)]
    count = options.kills if mode == "kill" else options.faults
    if count is None or count >= len(possible):
        return [Fault(mode, at) for at in possible]
    first = {kind: at for at, kind in reversed([*enumerate(kinds, 1)]) if at in possible}
    last = {kind: at for at, kind in enumerate(kinds, 1) if at in possible}
    fixed = sorted({*first.values(), *last.values()})
    rest = [at for at in possible if at not in fixed]
    if count < len(fixed):
        fixed = draw.sample(fixed, count)
    return [Fault(mode, at) for at in sorted([*fixed, *draw.sample(rest, count - len(fixed))])]


def strikes(mode: str, kind: str) -> bool:
    sync, write = kind in SYNCS, kind not in (*SYNCS, "replace", "posix_fallocate")
    return {"kill": True, "EIO": write, "sync": sync}.get(mode, write or kind == "posix_fallocate")


def try_fault(
    fault: Fault, command: Sequence[str], reference: Path, folder: Path, calls: Sequence[Call]
) -> tuple[int, list[str]]:
    """Blocks that were committed when the fault struck, and what went wrong."""
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
    before, damage = committed(out, reference)
    problems += damage

    again = run(command, None)
    if again.code:
        problems.append(f"second run: exit code {again.code}, {again.output.strip()[-300:]}")
    for view, block in before:
        places = block_places(header, view, block)
        if any(c.name == "pwrite" and c.offset in place for c in again.calls for place in places):
            problems.append(f"lost: block {block} of view {view} was written again")
    left = sorted(file.name for file in folder.iterdir())
    if left != [out.name]:
        problems.append(f"second run: left {', '.join(left)}")
    if not out.exists() or out.read_bytes() != reference.read_bytes():
        problems.append("differs: the file is not what an undisturbed dump writes")
    return len(before), problems


def check_ending(fault: Fault, ended: Ended) -> list[str]:
    """What is wrong with how the run ended."""
    if fault.mode == "kill":
        return [] if ended.code == -signal.SIGKILL else [f"ending: {ended.code}, expected a kill"]
    if ended.code != 1:
        return [f"ending: exit code {ended.code}, expected 1; {ended.output.strip()[-300:]}"]
    number = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "sync": errno.EIO}.get(
        fault.mode, errno.EFBIG
    )
    *_, last = ended.output.strip().split("\n")
    good = (
        last.startswith("Error: ")
        and ended.output.count("Error") == 1
        and os.strerror(number) in last
        and "run the same command" in last
    )
    return [] if good else [f"message: {ended.output.strip()[-400:]!r}"]


def committed(out: Path, reference: Path) -> tuple[list[Block], list[str]]:
    """Blocks that have the digest of the reference, and what is wrong with the file."""
    path = out if out.exists() else partial_path(out)
    if not path.exists():
        return [], []
    try:
        cache = open_cache(path, unfinished=True)
    except FormatError as error:
        return [], [f"damage: it does not open: {error}"]
    header, wanted = cache.header, open_cache(reference).arrays
    # a digest that was torn, which only a full disk does, commits nothing
    there: list[Block] = [
        (view, int(block))
        for view in (None, *range(header.views))
        for name, at in [("sample_digests", ()) if view is None else ("digests", (view,))]
        for block in np.flatnonzero(cache.arrays[name][at] == wanted[name][at])
    ]
    problems = []
    for part in find_damage(cache):
        if part.samples is None:
            problems.append(f"damage: {part}")
        elif (part.view, part.samples.start // header.block_rows) in there:
            problems.append(f"lost: {part}")
    return there, problems


def kind_of(call: Call, header: Header) -> str:
    """What a call writes, as the tables name it."""
    if call.name != "pwrite":
        return call.name
    if call.offset < header.user_block:
        front = {0: "preamble", PREAMBLE.size: "final header"}
        zeros = call.size == header.user_block // 2
        return front.get(call.offset, "zeros" if zeros else "first header")
    array = next(a for a in header.arrays if a.offset <= call.offset < a.offset + a.nbytes)
    return f"{'digest of' if array.axis == 'commits' else 'values of'} {array.name}"


# the child


class Disk:
    """Stands between the dump and the system: counts its calls, and lets one of them fail."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault = fault
        self.calls: list[Call] = []
        self._unsynced: list[tuple[int, int, bytes]] = []  # file, offset, what was there before
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in WATCHED}

    def install(self) -> None:
        for name in WATCHED:
            setattr(os, name, self._stand_in(name))

    def _stand_in(self, name: str) -> Callable[..., object]:
        def call(*arguments: Any, **options: Any) -> object:
            place = (arguments[2], len(arguments[1])) if name == "pwrite" else (0, 0)
            self.calls.append(Call(name, *place))
            self._fail(name, arguments)
            if name == "pwrite":
                file, values, offset = arguments
                self._unsynced.append((file, offset, os.pread(file, len(values), offset)))
            elif name in SYNCS:
                self._unsynced.clear()
            done = self._real[name](*arguments, **options)
            if self.fault == Fault("kill", len(self.calls)):
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        return call

    def _fail(self, name: str, arguments: Sequence[Any]) -> None:
        number = len(self.calls)
        match self.fault:
            case Fault("EIO", at) if number == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case Fault("ENOSPC", at) if number >= at and name in ("pwrite", "posix_fallocate"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case Fault("sync", at) if number == at:
                if not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                    for file, offset, before in reversed(self._unsynced):
                        self._real["pwrite"](file, before, offset)
                self._unsynced.clear()
                raise OSError(errno.EIO, os.strerror(errno.EIO))


def run(command: Sequence[str], fault: Fault | None) -> Ended:
    """Run softcache in a fork of this process, which has imported torch already."""
    sys.stdout.flush()
    sys.stderr.flush()
    printed, told = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(printed[0])
        os.close(told[0])
        _child(command, fault, printed[1], told[1])
    os.close(printed[1])
    os.close(told[1])
    with os.fdopen(printed[0], errors="replace") as pipe:
        output = pipe.read()
    with os.fdopen(told[0]) as pipe:
        calls = [Call(*fields) for fields in json.loads(pipe.read() or "[]")]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, output, calls)


def _child(command: Sequence[str], fault: Fault | None, output: int, calls: int) -> None:
    code = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        # commits must come of what was written, not of how long it took
        allocate.BLOCK_BYTES, writer.COMMIT_SECONDS = BLOCK_BYTES, 0.0
        disk = Disk(fault)
        disk.install()
        if fault is not None and fault.mode.startswith("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))
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
    """Stop unless committed() notices a block that is lost."""
    copy = reference.with_name("checked.h5")
    raw = bytearray(reference.read_bytes())
    header = open_cache(reference).header
    raw[block_places(header, 1, 2)[0].start] ^= 1
    copy.write_bytes(raw)
    there, problems = committed(copy, reference)
    copy.unlink()
    samples = header.block_range(2)
    wanted = [f"lost: soft targets of samples {samples.start} to {samples.stop - 1} in view 1"]
    if problems != wanted or len(there) != header.blocks * (header.views + 1):
        raise SystemExit("committed() does not notice a lost block; this campaign shows nothing")


if __name__ == "__main__":
    main()

"""Two softcache commands at once on the same files: each ends right, and nothing comes out damaged.

Pairs of commands run as forks of one process that has imported torch already. The second starts 0 to some
hundred milliseconds after the first, the teacher and the student sleep in every batch, and so does each
process before its calls of the file system, to widen the moments in which the two can meet. Kinds of pairs
take turns; everything that is drawn depends on the seed of the pair.

Each process must exit with 0, or with another code and a single line on stderr, within 30 s. A writer may
only be refused with the process id of the other one, or since its work is already done. At most one of two
writers may do the work. Every result must be, to the byte, that of a run that nobody disturbed, from the
moment it is there: caches, run folders, exported labels. What lost is run again, and must succeed, or say
that the work is already done. Then no other file may be left. The rules, as the table names them:

    signal      a process was killed by a signal
    hang        a process did not end
    message     stderr has more than the one line of an error, or a line other than a warning
    failed      a process failed whose input was there all the time
    refused     a writer was refused, and did not say which process holds its file
    both        both writers did the work, or claim it
    differs     a result is not that of an undisturbed run
    again       what lost fails when it is run again
    left        other files are left

The moments of a pair depend on the machine: a failure may need several tries of --pair KIND --seed N.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tabulate import tabulate

import softcache
from softcache.cache import allocate, open_cache, writer
from softcache.cache.verify import find_damage
from softcache.cli.app import main as cli
from softcache.errors import FormatError
from softcache.files import pull, remote
from tests.bench import machine, work_folder
from tests.servers import http_server

SAMPLES, SIDE, CLASSES, BATCH = 1024, 6, 10, 64
BLOCK_BYTES, COMMIT_SECONDS = 2048, 0.05  # many blocks, committed all the time
PART_BYTES = 4096  # of a request, so that a pull takes many
DELAY = (
    "BENCH_DELAY"  # environment variable: seconds that teacher and student sleep for every batch
)
SLEEP = 0.005  # seconds for every batch, and for every request to the server
DISK_SLEEP = 0.002  # seconds at most, before every call in SLOWED and Path.open()
SLOWED = ("open", "pwrite", "fsync", "fdatasync", "posix_fallocate", "replace", "unlink")
LIMIT = 30.0  # seconds in which every process must end
POLL = 0.002  # seconds between two looks at the processes and the result
DAMAGED_BYTES = (100, 3000)  # of the values of the damaged cache: in two blocks
RULES = ("signal", "hang", "message", "failed", "refused", "both", "differs", "again", "left")
DONE = re.compile(r"already (complete|holds)|holds a finished run")
KEPT = re.compile(r"\.content-id$")  # files that softcache keeps beside a pulled cache
# imported where they are needed, which would take every process a while
PRELOADED = (
    "aiohttp", "fsspec.implementations.http", "fsspec.implementations.local", "h5py",
    "safetensors.torch", "torch._dynamo",
)  # fmt: skip

WRITER, READER, MUST = "writer", "reader", "must"

CODE = f'''
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

def student():
    return Slow({SIDE * SIDE}, {CLASSES})
'''

# {stock} is the folder of what undisturbed runs made, {here} that of the pair
DUMP = (
    "dump --teacher {stock}/slow.py:teacher --data npz:{stock}/data.npz --views 2 --augment shift:1 "
    f"--batch-size {BATCH} --device cpu --out {{here}}/cache.h5 --temperature "
)
COOL, HOT, SHARD = f"{DUMP} 4", f"{DUMP} 8", f"{DUMP} 4 --shard"
MERGE = "merge {stock}/shard-0/cache.h5 {stock}/shard-1/cache.h5 --out {here}/cache.h5"
PULL = "pull {url}/cool/cache.h5 --out {here}/cache.h5"
TRAIN = (
    "train --data npz:{stock}/data.npz --student {stock}/slow.py:student --epochs 3 --device cpu "
)
TRAIN_COOL = f"{TRAIN} {{stock}}/cool/cache.h5 --out {{here}}/run"
TRAIN_HERE = f"{TRAIN} {{here}}/cache.h5 --out {{here}}/run"
TRAIN_URL = f"{TRAIN} {{url}}/cool/cache.h5 --out {{here}}"
EXPORT = "export-labels {here}/cache.h5 --out {here}/labels.npy"
VERIFY, INFO, REPAIR = (f"{name} {{here}}/cache.h5" for name in ("verify", "info", "repair"))
COMPARE = "compare {here}/run --student {stock}/slow.py:student"
PUSH = "push {stock}/cool/cache.h5 {here}/cache.h5"
ONE_VIEW = COOL.replace("--views 2", "--views 1")


@dataclass(frozen=True)
class Job:
    """One of the commands of a pair.

    Attributes:
        role: WRITER, which does the work or is refused; READER, whose input may not be there yet; MUST,
            which must succeed, since its input is there all the time.
    """

    command: str
    role: str = WRITER


@dataclass(frozen=True)
class Kind:
    """Two commands that run at once.

    Attributes:
        jobs: the commands; which of them starts first is drawn.
        results: by its path or pattern, the undisturbed results of which one is expected, as paths in the
            stock.
        given: copies of the stock that are there at the start, by path.
        watch: the path of a file that is replaced as a whole; empty for none.
        versions: how many versions of it may be there, one after the other.
        same: whether both ask for the same; if not, one is refused for good once the other has finished.
        claims: whether a command says if it finds its work done, instead of reporting it like its own.
        finish: a command that completes the result in the end.
        delay: seconds after which the second command starts, at most.
    """

    jobs: tuple[Job, Job]
    results: Mapping[str, Sequence[str]]
    given: Mapping[str, str] = field(default_factory=dict)
    watch: str = "cache.h5"
    versions: int = 1
    same: bool = True
    claims: bool = True
    finish: str = ""
    delay: float = 0.5


def writers(first: str, second: str) -> tuple[Job, Job]:
    """Two commands that write the same file."""
    return Job(first), Job(second)


def dumped(*items: str) -> dict[str, list[str]]:
    """A cache that is the same as one of these of the stock."""
    return {"cache.h5": [f"{item}/cache.h5" for item in items]}


RUN = {"run": ["run/run"]}
HOT_RUN = {"run": ["run/run", "hot-run/run"]}
HERE = {"cache.h5": "cool/cache.h5"}
DAMAGED = {"cache.h5": "damaged/cache.h5"}
WEIGHTS = "run/student.safetensors"

KINDS = {
    "dump+dump": Kind(writers(COOL, COOL), dumped("cool")),
    "dump+other-dump": Kind(writers(COOL, HOT), dumped("cool", "hot"), same=False),
    "more-views+more-views": Kind(
        writers(COOL, COOL),
        dumped("cool-views"),
        {"cache.h5": "one-view/cache.h5"},
        versions=2,
    ),
    "overwrite+other-overwrite": Kind(
        writers(f"{COOL} --overwrite", f"{HOT} --overwrite"),
        dumped("cool", "hot"),
        HERE,
        versions=3,
        same=False,
        claims=False,
    ),
    "dump+merge": Kind(writers(COOL, MERGE), dumped("cool", "merged"), same=False),
    "dump+pull": Kind(writers(COOL, PULL), dumped("cool"), claims=False),
    "merge+merge": Kind(writers(MERGE, MERGE), dumped("merged")),
    "pull+pull": Kind(writers(PULL, PULL), dumped("cool"), claims=False),
    "push+push": Kind(
        writers(PUSH, PUSH),
        dumped("cool") | {"README.md": ["pushed/README.md"]},
        claims=False,
        delay=0.05,
    ),
    "train-url+train-url": Kind(
        (Job(f"{TRAIN_URL}/a/run", MUST), Job(f"{TRAIN_URL}/b/run", MUST)),
        {
            "a/run": ["run/run"],
            "b/run": ["run/run"],
            "home/softcache/*/whole/cache.h5": ["cool/cache.h5"],
        },
        watch="",
    ),
    "train+train": Kind(writers(TRAIN_COOL, TRAIN_COOL), RUN, watch=WEIGHTS),
    "train+other-train": Kind(
        writers(TRAIN_COOL, f"{TRAIN_COOL} --seed 1"),
        {"run": ["run/run", "other-run/run"]},
        watch=WEIGHTS,
        same=False,
    ),
    "train+compare": Kind((Job(TRAIN_COOL), Job(COMPARE, READER)), RUN, watch=WEIGHTS, delay=0.8),
    "dump+verify": Kind((Job(COOL), Job(VERIFY, READER)), dumped("cool")),
    "dump+info": Kind((Job(COOL), Job(INFO, READER)), dumped("cool")),
    "merge+verify": Kind((Job(MERGE), Job(VERIFY, READER)), dumped("merged")),
    "pull+verify": Kind((Job(PULL), Job(VERIFY, READER)), dumped("cool")),
    "train+overwrite": Kind(
        (Job(TRAIN_HERE, MUST), Job(f"{HOT} --overwrite", MUST)),
        dumped("hot") | HOT_RUN,
        HERE,
        versions=2,
    ),
    "verify+overwrite": Kind(
        (Job(VERIFY, MUST), Job(f"{HOT} --overwrite", MUST)), dumped("hot"), HERE, versions=2
    ),
    "export+overwrite": Kind(
        (Job(EXPORT, MUST), Job(f"{HOT} --overwrite", MUST)),
        dumped("hot") | {"labels.npy": ["labels/labels.npy", "hot-labels/labels.npy"]},
        HERE,
        versions=2,
    ),
    "export+export": Kind(
        writers(EXPORT, EXPORT),
        dumped("cool") | {"labels.npy": ["labels/labels.npy"]},
        HERE,
        watch="",
        claims=False,
        delay=0.01,
    ),
    "repair+dump": Kind(
        writers(REPAIR, COOL), dumped("cool"), DAMAGED, versions=2, claims=False, finish=COOL
    ),
    "repair+repair": Kind(
        writers(REPAIR, REPAIR),
        dumped("cool"),
        DAMAGED,
        same=False,
        claims=False,
        finish=COOL,
        delay=0.1,
    ),
    "repair+verify": Kind(
        (Job(REPAIR), Job(VERIFY, READER)), dumped("cool"), DAMAGED, finish=COOL, delay=0.1
    ),
    "repaired+repaired": Kind(
        writers(COOL, COOL), dumped("cool"), {"cache.h5.partial": "repaired/cache.h5.partial"}
    ),
}

# what undisturbed runs make: what is there before, and the command
STOCK: Mapping[str, tuple[Mapping[str, str], str]] = {
    "cool": ({}, COOL),
    "hot": ({}, HOT),
    "one-view": ({}, ONE_VIEW),
    "cool-views": ({"cache.h5": "one-view/cache.h5"}, COOL),
    "shard-0": ({}, f"{SHARD} 0/2"),
    "shard-1": ({}, f"{SHARD} 1/2 --like {{stock}}/shard-0/cache.h5"),
    "merged": ({}, MERGE),
    "pushed": ({}, PUSH),
    "run": ({}, TRAIN_COOL),
    "other-run": ({}, f"{TRAIN_COOL} --seed 1"),
    "hot-run": ({"cache.h5": "hot/cache.h5"}, TRAIN_HERE),
    "labels": (HERE, EXPORT),
    "hot-labels": ({"cache.h5": "hot/cache.h5"}, EXPORT),
    "damaged": (HERE, ""),
    "repaired": (DAMAGED, REPAIR),
}


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code, or minus the signal; None if it did not end by itself.
        seconds: when it ended, after the start of the pair.
    """

    pid: int
    code: int | None
    seconds: float
    out: str
    err: str

    @property
    def says(self) -> str:
        """The end of what it printed on stderr, on one line."""
        return " ".join(self.err.split())[-300:]


@dataclass(frozen=True)
class Outcome:
    """What came of a pair; `problems` begin with the name of a broken rule."""

    kind: str
    seed: int
    codes: tuple[int | None, int | None]
    overlap: bool  # whether the first was still running when the second started
    problems: Sequence[str]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, help="number of pairs [default: 200; 1 with --pair]")
    parser.add_argument("--pair", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the first pair; the next has + 1")
    parser.add_argument("--folder", type=Path, help="folder for files [default: a temporary one]")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # numpy has started its threads already, and a fork of a process with threads can hang
        arguments = [sys.executable, "-m", "tests.bench.races", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"OMP_NUM_THREADS": "1"})
    kinds = options.pair or list(KINDS)
    pairs = options.pairs or (len(kinds) if options.pair else 200)
    prepare()
    outcomes: list[Outcome] = []
    with work_folder(options.folder) as folder, Stock.make(folder.resolve() / "stock") as stock:
        for number in range(pairs):
            kind = kinds[number % len(kinds)]
            outcome = race(kind, options.seed + number, stock, folder.resolve() / "pair")
            outcomes.append(outcome)
            for problem in outcome.problems:
                print(f"--pair {kind} --seed {outcome.seed}: {problem}", flush=True)
    seconds = sum(outcome.seconds for outcome in outcomes)
    print(f"\n{pairs} pairs, {seconds / pairs:.2f} s each; {machine()}")
    print(table(outcomes))
    if any(outcome.problems for outcome in outcomes):
        raise SystemExit("\nrules were broken")
    print("\nno rule was broken")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each kind: how its pairs ended, and which rules they broke."""
    lines: list[tuple[object, ...]] = []
    for kind in [*dict.fromkeys(outcome.kind for outcome in outcomes), "all"]:
        of_kind = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        broken = Counter(
            rule
            for outcome in of_kind
            for rule in {problem.partition(":")[0] for problem in outcome.problems}
        )
        lines.append(
            (
                kind,
                len(of_kind),
                sum(outcome.overlap for outcome in of_kind),
                sum(outcome.codes == (0, 0) for outcome in of_kind),
                sum(outcome.codes.count(0) == 1 for outcome in of_kind),
                sum(bool(outcome.problems) for outcome in of_kind),
                ", ".join(f"{rule} {broken[rule]}" for rule in RULES if broken[rule]),
            )
        )
    headers = ("pair", "pairs", "at once", "both 0", "one refused", "broken", "broken rules")
    return tabulate(lines, headers=headers)


# a pair


def race(name: str, seed: int, stock: Stock, folder: Path) -> Outcome:
    """Run a pair, then what lost again, and check every rule."""
    start, kind, draw = time.monotonic(), KINDS[name], random.Random(f"{name} {seed}")
    stock.provide(kind)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, item in kind.given.items():
        shutil.copyfile(stock.folder / item, folder / path)
    order = draw.sample((0, 1), 2)
    # a quarter of the pairs start at the same moment
    delay = max(0.0, draw.uniform(-kind.delay / 3, kind.delay))
    seeds = [draw.random(), draw.random()]
    commands = [words(job.command, stock, folder) for job in kind.jobs]
    ended, versions = run_both(commands, order, delay, seeds, folder, kind.watch)
    problems = [problem for number in range(2) for problem in ending_problems(kind, number, ended)]
    problems += both_problems(kind, ended, versions)
    early = [*state_problems(kind, stock.folder, folder, early=True)]
    problems += early

    losers = [n for n, job in enumerate(kind.jobs) if ended[n].code != 0]
    losers.sort(key=lambda n: kind.jobs[n].role == READER)  # readers need the result
    again = [(commands[n], kind.same) for n in losers]
    if kind.finish:
        place = sum(kind.jobs[n].role != READER for n in losers)
        again.insert(place, (words(kind.finish, stock, folder), True))
    for command, must in again:
        problems += again_problems(command, run(command, folder), must=must)
    late = state_problems(kind, stock.folder, folder, early=False)
    problems += [problem for problem in late if problem not in early]
    codes = ended[0].code, ended[1].code
    note = f" [{delay:.3f} s after {'the other' if order[0] else 'the first command'}]"
    problems = [problem + note for problem in problems]
    overlap = ended[order[0]].seconds > delay
    return Outcome(name, seed, codes, overlap, problems, time.monotonic() - start)


def ending_problems(kind: Kind, number: int, both: Sequence[Ended]) -> list[str]:
    """What is wrong with how a process of a pair ended, and with what it printed."""
    job, ended, other = kind.jobs[number], both[number], both[1 - number]
    what = job.command.split()[0]
    if ended.code is None:
        return [f"hang: {what} did not end in {LIMIT:.0f} s; {ended.says}"]
    if ended.code < 0:
        return [f"signal: {what} ended with {signal.Signals(-ended.code).name}; {ended.says}"]
    lines = ended.err.splitlines()
    if ended.code == 0:
        others = [line for line in lines if not line.startswith("warning: ")]
        return [f"message: {what} succeeded and printed {others[0]!r}"] if others else []
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        return [f"message: {what} printed {len(lines)} lines, exit code {ended.code}; {ended.says}"]
    if job.role == READER:
        return []
    if job.role == MUST or kind.jobs[1 - number].role == READER:
        return [f"failed: {what}: {ended.says}"]
    is_explained = (
        re.search(rf"\b{other.pid}\b", lines[0])
        or DONE.search(lines[0])
        or (not kind.same and other.code == 0 and other.seconds < ended.seconds)
    )
    return [] if is_explained else [f"refused: {what}: {ended.says}"]


def both_problems(kind: Kind, ended: Sequence[Ended], versions: int) -> list[str]:
    """Whether both of two writers did the work."""
    if versions > kind.versions:
        return [f"both: {kind.watch} had {versions} versions, expected {kind.versions} at most"]
    are_writers = all(job.role == WRITER for job in kind.jobs)
    if not are_writers or not kind.claims or any(e.code for e in ended):
        return []
    if any(DONE.search(e.out) for e in ended):
        return []
    return ["both: both succeeded, and none found the work done"]


def again_problems(command: Sequence[str], ended: Ended, *, must: bool) -> list[str]:
    """What is wrong with a command that was run again after the pair."""
    if ended.code == 0 or DONE.search(ended.err):
        return []
    is_refused = ended.code is not None and ended.code > 0 and ended.err.count("\n") == 1
    if is_refused and not must:
        return []
    return [f"again: {command[0]} with exit code {ended.code}; {ended.says}"]


def state_problems(kind: Kind, stock: Path, folder: Path, *, early: bool) -> Iterator[str]:
    """Results that are not those of undisturbed runs, and files that should not be there.

    Args:
        early: before what lost is run again, when results may be missing, and files be left.
    """
    expected: set[str] = set()
    for pattern, items in kind.results.items():
        found = sorted(folder.glob(pattern))
        if len(found) > 1 or not (found or early):
            yield f"differs: {pattern} is there {len(found)} times, expected once"
        given = [kind.given[pattern]] if early and pattern in kind.given else []
        for path in found:
            files = contents(path, folder)
            expected |= {str((path / name).relative_to(folder)) for name in files}
            references = [
                contents(stock / item, stock / item.partition("/")[0]) for item in [*items, *given]
            ]
            if early and not set(references[0]) <= set(files):
                continue  # an unfinished run folder
            if files not in references:
                # the reference that it is most similar to
                nearest = min(references, key=lambda r: len(differing(files, r)))
                for name in differing(files, nearest):
                    rule = "differs" if name in nearest else "left"
                    yield f"{rule}: {pattern} {name}: {describe(path / name)}".replace(" .:", ":")
    if not early:
        left = sorted(set(contents(folder, folder)) - expected)
        if left:
            yield f"left: {', '.join(left)}"


def contents(path: Path, here: Path) -> dict[str, bytes]:
    """The bytes of a file, as ".", or of all files in a folder that are not kept, by relative path.

    Args:
        here: the folder of the commands, whose own path is left out of the bytes.
    """
    paths = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(path)): file.read_bytes().replace(os.fsencode(here), b"")
        for file in paths
        if not KEPT.search(file.name)
    }


def differing(files: Mapping[str, bytes], others: Mapping[str, bytes]) -> list[str]:
    """The names of files that only one has, or that are not the same."""
    return sorted(n for n in {*files, *others} if files.get(n) != others.get(n))


def describe(path: Path) -> str:
    """What can be said about a file that is not as expected."""
    if not path.exists():
        return "missing"
    if path.name == "metrics.jsonl":
        epochs = re.findall(r'"epoch": (\d+)', path.read_text())
        return f"epochs {' '.join(epochs)}"
    if path.suffix == ".h5":
        try:
            damage = find_damage(open_cache(path))
        except FormatError as error:
            return str(error)
        return f"damaged: {next(iter(damage))}" if damage else "intact, but other bytes"
    return f"{path.stat().st_size:,} bytes"


# the stock


@dataclass
class Stock:
    """What undisturbed runs make, and a server of it.

    Attributes:
        made: the items that are there.
    """

    folder: Path
    url: str
    made: set[str] = field(default_factory=set)

    @classmethod
    @contextmanager
    def make(cls, folder: Path) -> Iterator[Stock]:
        """An empty stock with the data and the code of the models."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        numbers = np.random.default_rng(0)
        images = numbers.integers(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=np.uint8)
        np.savez(folder / "data.npz", x=images, y=numbers.integers(0, CLASSES, SAMPLES))
        (folder / "slow.py").write_text(CODE)
        with server(folder) as url:
            yield cls(folder, url)

    def provide(self, kind: Kind) -> None:
        """Make what a kind needs, unless it is there."""
        for job in kind.jobs:
            self._make_for(job.command)
        self._make_for(kind.finish)
        for item in (*kind.given.values(), *(i for items in kind.results.values() for i in items)):
            self._make(item.partition("/")[0])

    def _make_for(self, command: str) -> None:
        for item in re.findall(r"{(?:stock|url)}/([\w-]+)/", command):
            self._make(item)

    def _make(self, item: str) -> None:
        if item in self.made:
            return
        self.made.add(item)
        given, command = STOCK[item]
        self._make_for(command)
        here = self.folder / item
        here.mkdir()
        for path, other in given.items():
            self._make(other.partition("/")[0])
            shutil.copyfile(self.folder / other, here / path)
        if not command:
            damage(here / "cache.h5")
            return
        ended = run(words(command, self, here), here)
        if ended.code:
            raise SystemExit(f"softcache {command} failed:\n{ended.out}{ended.err}")


def damage(path: Path) -> None:
    """Flip bits in two blocks of a cache."""
    raw = bytearray(path.read_bytes())
    start = open_cache(path).header.array("log_probs").offset
    for position in DAMAGED_BYTES:
        raw[start + position] ^= 1
    path.write_bytes(raw)


def words(command: str, stock: Stock, here: Path) -> list[str]:
    """The words of a command, with the folders in their places."""
    places = {"stock": stock.folder, "url": stock.url, "here": here}
    return [word.format(**places) for word in command.split()]


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serve a folder from a process of its own, so that this one has no threads; yields its address."""
    address, end = os.pipe(), os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if not process:
        os.close(end[1])
        try:
            with http_server(folder) as served:
                served.answer = _slow_answer
                os.write(address[1], served.url.encode())
                os.read(end[0], 1)  # returns when the parent closes its end
        finally:
            os._exit(0)
    os.close(end[0])
    url = os.read(address[0], 100).decode()
    try:
        yield url
    finally:
        os.close(end[1])
        os.waitpid(process, 0)
        os.close(address[0])
        os.close(address[1])


def _slow_answer(start: int, body: bytes) -> bytes:
    time.sleep(SLEEP)
    return body


# processes


def prepare() -> None:
    """Import all that the commands need, and make blocks and requests small; no thread may start."""
    torch.set_num_threads(1)
    modules = pkgutil.walk_packages(softcache.__path__, "softcache.")
    for name in [*(module.name for module in modules), *PRELOADED]:
        if not name.endswith("__main__"):
            importlib.import_module(name)
    allocate.BLOCK_BYTES, writer.COMMIT_SECONDS = BLOCK_BYTES, COMMIT_SECONDS
    for module in (pull, remote):
        vars(module)["PART"] = PART_BYTES  # pull has it from remote
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise SystemExit(f"{threads} threads after the imports; expected one, so that it can fork")
    gc.collect()
    gc.freeze()


def run(command: Sequence[str], folder: Path) -> Ended:
    """Run a command that nothing slows down or disturbs."""
    child = start(command, folder, "alone", None)
    return wait([child], time.monotonic())[0]


def run_both(
    commands: Sequence[Sequence[str]],
    order: Sequence[int],
    delay: float,
    seeds: Sequence[float],
    folder: Path,
    watch: str,
) -> tuple[list[Ended], int]:
    """Run two commands at once.

    Args:
        order: which starts first.
        seeds: of the moments at which each of them sleeps.
        watch: a path in the folder; "" for none.

    Returns:
        How each ended, and how many versions of the watched file were seen.
    """
    began = time.monotonic()
    versions: set[tuple[int, int]] = set()

    def look() -> None:
        try:
            status = (folder / watch).stat()
        except FileNotFoundError:
            return
        versions.add((status.st_ino, status.st_mtime_ns))

    look_at = look if watch else lambda: None
    look_at()
    children: dict[int, Child] = {}
    for number in order:
        while children and time.monotonic() < began + delay:
            look_at()
            time.sleep(POLL)
        slowed = random.Random(seeds[number])
        children[number] = start(commands[number], folder, str(number), slowed)
    ended = wait([children[0], children[1]], began, look_at)
    return ended, len(versions)


@dataclass(frozen=True)
class Child:
    """A running process, and the files of its output."""

    pid: int
    out: Path
    err: Path


def start(command: Sequence[str], folder: Path, name: str, slowed: random.Random | None) -> Child:
    """Start a softcache command in a fork of this process.

    Args:
        name: of the files of its output, beside the folder.
        slowed: draws how long it sleeps before calls of the file system; None leaves it as it is.
    """
    out, err = (folder.with_name(f"{folder.name}-{name}.{stream}") for stream in ("out", "err"))
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _child(command, folder, (out, err), slowed)
    return Child(pid, out, err)


def wait(
    children: Sequence[Child], began: float, look: Callable[[], None] = lambda: None
) -> list[Ended]:
    """Wait until all processes have ended; those that do not end in time are killed."""
    ended: dict[int, Ended] = {}
    deadline = time.monotonic() + LIMIT
    while len(ended) < len(children):
        look()
        for child in children:
            if child.pid in ended:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            is_late = not pid and time.monotonic() > deadline
            if is_late:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
            if pid or is_late:
                code = None if is_late else os.waitstatus_to_exitcode(status)
                seconds = time.monotonic() - began
                texts = (file.read_text(errors="replace") for file in (child.out, child.err))
                ended[child.pid] = Ended(child.pid, code, seconds, *texts)
        time.sleep(POLL)
    look()
    return [ended[child.pid] for child in children]


def _child(
    command: Sequence[str],
    folder: Path,
    outputs: tuple[Path, Path],
    slowed: random.Random | None,
) -> NoReturn:
    code = 99
    try:
        for number, path in enumerate(outputs, 1):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        os.environ["XDG_CACHE_HOME"] = str(folder / "home")
        if slowed is not None:
            os.environ[DELAY] = str(SLEEP)
            _slow_down(slowed)
        try:
            cli([*command], prog_name="softcache")
        except SystemExit as stop:
            code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _slow_down(draw: random.Random) -> None:
    """Make this process sleep for a moment before each call of the file system."""
    for name in SLOWED:
        setattr(os, name, _slowed(getattr(os, name), draw))
    vars(io)["open"] = _slowed(io.open, draw)  # as Path.open() calls it


def _slowed(call: Callable[..., Any], draw: random.Random) -> Callable[..., Any]:
    def slowed(*arguments: Any, **options: Any) -> object:
        time.sleep(draw.uniform(0, DISK_SLEEP))
        return call(*arguments, **options)

    return slowed


if __name__ == "__main__":
    main()

"""Mutated headers and files, as a stranger might send them, through everything that reads a cache.

Each file is opened, described as `softcache info` does, read (a few rows) and verified, in worker
processes with little memory. What must not happen: a signal, a call of more than a second, more than
300 MB, any file opened but the cache, an exception other than softcache's own, a message of more than
one line, or a character from the file that could steer a terminal.

    bytes      bits, words, spans of the file changed, cut or added; no digest is mended
    preamble   another place, length or digest of the header
    text       the header's JSON cut, doubled, with constants, brackets, huge numbers put in
    values     values of the header replaced, removed, renamed, by others and by subtrees of it
    arrays     offsets, shapes, types, names, axes of the arrays changed, exchanged, doubled
    plausible  a header that keeps all rules, of any encoding and sizes, over random bytes
    hollow     the same with huge sizes, in a sparse file of up to 4 TB

From `text` on the header's digest is right. Files and answers depend on --seed and the number alone;
`--index N --folder DIR` makes file N again, keeps it and shows what becomes of it. The limit is one of
private memory (RLIMIT_DATA), since a map of a large file takes address space and no memory; the peak
is that of resident memory, pages of the mapped file among them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache import Array, Basis, Dense, Encoding, Header, Quantized, Sampled, TopK
from softcache.cache.encodings import DTYPES
from softcache.cache.header import (
    PREAMBLE,
    digest_arrays,
    expected_arrays,
    parse_header,
    parse_preamble,
    preamble,
)
from softcache.cache.reader import Cache, open_cache
from softcache.cache.verify import find_damage
from softcache.errors import SoftcacheError
from softcache.files.describe import describe

# a worker runs this file by its path and never imports torch, whose own memory would hide a peak:
# what comes from tests.bench is imported where the parent needs it

KINDS = {
    "bytes": 4, "preamble": 2, "text": 3, "values": 5, "arrays": 3, "plausible": 3, "hollow": 1,
}  # fmt: skip  # how often, in proportion
SECONDS = 1.0
SUSPICIOUS = SECONDS / 2  # such a call is made again: the machine may have been busy
HANGS = 10  # seconds until SIGALRM
PEAK = 300_000_000  # bytes
PRIVATE_MEMORY = 1 << 30
HOLLOW = 1 << 42  # bytes, at the most
# files with more bytes behind the user block, or more blocks that are there, are not verified
VERIFIED, VERIFIED_BLOCKS = 1 << 24, 1 << 14
VALUES = 1 << 20  # nor are rows read that have more values than that
MESSAGE = 600  # characters
FORBIDDEN = (
    "open", "import", "exec", "os.", "shutil.", "socket.", "subprocess.", "ctypes.", "pickle.",
)  # fmt: skip  # audit events; os.open() itself is "open"

# a broken rule: the word that the table counts it by, and what happened
Problem = tuple[str, str]
Container = dict[Any, Any] | list[Any]


@dataclass(frozen=True)
class Report:
    """What became of one file."""

    index: int
    kind: str
    outcome: str  # opened, or why it was refused
    seconds: float  # of its slowest call
    peak: int  # bytes of resident memory
    problems: list[Problem]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="only this file, kept in --folder")
    parser.add_argument("--reasons", action="store_true", help="list the reasons of refusal")
    parser.add_argument("--folder", type=Path, help="for files [default: a temporary folder]")
    options = parser.parse_args()
    from tests.bench import machine, work_folder
    from tests.bench.corruptions import small_caches

    with work_folder(options.folder) as folder:
        (folder / "seeds").mkdir(exist_ok=True)
        small_caches(folder / "seeds")
        self_check(folder)
        if options.index is not None:
            print(one(folder, options.seed, options.index))
            return
        reports = campaign(folder, options.files, options.workers, options.seed)
        print(f"{options.files:,} files, seed {options.seed}; {machine()}\n")
    if summary(reports, options.reasons):
        raise SystemExit("\na rule was broken; --index N --folder DIR shows a file by itself")


# the parent


def campaign(folder: Path, files: int, workers: int, seed: int) -> list[Report]:
    """Reports of all files, a worker for every one of `workers` shares."""
    reports: list[list[Report]] = [[] for _ in range(workers)]
    threads = [
        threading.Thread(target=attend, args=(folder, first, workers, files, seed, reports[first]))
        for first in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted((r for share in reports for r in share), key=lambda r: r.index)
    if [report.index for report in found] != list(range(files)):
        raise SystemExit(f"{len(found):,} files of {files:,} have a report; mend this campaign")
    return found


def attend(
    folder: Path, first: int, step: int, files: int, seed: int, reports: list[Report]
) -> None:
    """Run a worker over every `step`-th file; start another where one dies."""
    at = first
    while at < files:
        command = [sys.executable, "-P", __file__, str(folder), *map(str, (at, step, files, seed))]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            fields = json.loads(line)
            problems = [(str(rule), str(what)) for rule, what in fields.pop("problems")]
            reports.append(Report(**fields, problems=problems))
            at = reports[-1].index + step
            if at % 5000 < step:
                print(f"{at:,} of {files:,} files", file=sys.stderr, flush=True)
        said, code = process.stderr.read(), process.wait()
        process.stdout.close()
        process.stderr.close()
        if code or at < files:  # it died of the file that comes next
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            kind = kind_of(random.Random(f"{seed} {at}"))
            where = re.findall(r'File ".*?(\w+\.py)", line (\d+) in (\w+)', said)
            place = " < ".join(f"{file}:{line} {function}" for file, line, function in where[:4])
            problem = ("signal", f"{name}: {place or ascii(said[-300:])}")
            reports.append(Report(at, kind, "died", 0.0, 0, [problem]))
            at += step


def summary(reports: Sequence[Report], reasons: bool) -> bool:
    """Print the tables; whether a rule was broken."""
    from tabulate import tabulate

    rules = ("signal", "slow", "memory", "opened", "exception", "message")
    lines = []
    for kind in [*KINDS, "all"]:
        some = [r for r in reports if kind in (r.kind, "all")]
        broken = Counter(rule for r in some for rule in {rule for rule, _ in r.problems})
        slowest = max((r.seconds for r in some), default=0.0)
        opened = sum(r.outcome == "opened" for r in some)
        lines.append(
            (kind, len(some), opened, f"{1000 * slowest:,.1f}", *(broken[rule] for rule in rules))
        )
    headers = ("kind", "files", "opened", "slowest call, ms", *rules)
    print(tabulate(lines, headers=headers, intfmt=","))
    print(f"\npeak memory: {max(r.peak for r in reports) / 1e6:,.0f} MB")
    why = Counter(r.outcome for r in reports)
    print(f"different reasons of refusal: {len(why) - 1}")
    if reasons:
        print(tabulate(why.most_common(), headers=("outcome", "files"), intfmt=","))
    examples: dict[str, list[str]] = {}
    for report in reports:
        for rule, what in report.problems:
            text = f"  file {report.index}, {report.kind}: {what}"
            alike = re.split(r"['\"(]", re.sub("[0-9.]+", "#", what))[0]
            examples.setdefault(f"{rule} {alike}", []).append(text)
    for texts in examples.values():
        print(f"{len(texts)} times:\n" + "\n".join(texts[:2]))
    return bool(examples)


def one(folder: Path, seed: int, index: int) -> Report:
    """Make a file again, and say what becomes of it."""
    with Attacker(folder, seed, str(os.getpid())) as attacker:
        attacker.show = True
        report = attacker.attack(index)
        print(f"{attacker.path} is kept")
    return report


def self_check(folder: Path) -> None:
    """Stop unless every rule is seen when it is broken."""

    def fails(error: BaseException) -> Callable[[Path], None]:
        def call(path: Path) -> None:
            raise error

        return call

    breaks: dict[str, Callable[[Path], object]] = {
        "slow": lambda path: time.sleep(SECONDS * 1.1),
        "opened": lambda path: (path.parent / "seeds" / "small.py").read_text(),
        "exception": fails(IndexError("out of bounds")),
        "message": fails(SoftcacheError("two\nlines")),
    }
    with Attacker(folder, 0, "check") as attacker:
        for rule, call in breaks.items():
            _, problems = attacker.call(rule, partial(call, attacker.path))
            if [broken for broken, _ in problems] != [rule]:
                raise SystemExit(f"a broken rule, {rule}, is seen as {problems}")
        _, problems = attacker.call("info", lambda: check_text("\x1b[31mred"))
        if [broken for broken, _ in problems] != ["message"]:
            raise SystemExit("a character that steers the terminal is not seen")


# the worker


class Attacker:
    """Makes files and sees what the reader does with them; a context manager, for its audit hook."""

    def __init__(self, folder: Path, seed: int, name: str) -> None:
        self.seeds = [Original(path) for path in sorted((folder / "seeds").glob("*.h5"))]
        self.seed = seed
        self.path = folder / f"hostile-{name}.h5"
        self.show = False
        self._watched = False
        self._events: list[str] = []
        for original in self.seeds:  # so that nothing is imported later on
            self.path.unlink(missing_ok=True)
            self.path.write_bytes(original.raw)
            self._stages()
        sys.addaudithook(self._hook)

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *error: object) -> None:
        self._watched = False  # a hook cannot be removed
        if not self.show:
            self.path.unlink(missing_ok=True)

    def attack(self, index: int) -> Report:
        draw = random.Random(f"{self.seed} {index}")
        kind = kind_of(draw)
        raw, size = mutate(kind, self.seeds, draw)
        self.path.unlink(missing_ok=True)  # never change a file that may still be mapped
        with self.path.open("wb") as file:
            file.write(raw)
            file.truncate(size)
        forget_peak()
        outcome, seconds, problems = self._stages()
        peak = peak_memory()
        if peak > PEAK:
            problems.append(("memory", f"{peak:,} bytes"))
        return Report(index, kind, outcome, seconds, peak, problems)

    def _stages(self) -> tuple[str, float, list[Problem]]:
        """Outcome, seconds of the slowest call, and broken rules of the file."""
        found: list[Cache] = []

        def opens() -> None:
            found[:] = [open_cache(self.path, unfinished=True)]

        stages: dict[str, Callable[[], object]] = {
            "open": opens,
            "info": lambda: check_text(describe(found[0])),
            "rows": lambda: read_rows(found[0]),
            "verify": lambda: takes_long(found[0]) or find_damage(found[0]),
        }
        slowest, problems, outcome = 0.0, list[Problem](), "opened"
        for stage, call in stages.items():
            (seconds, refusal), broken = self.call(stage, call)
            slowest, problems = max(slowest, seconds), problems + broken
            if stage == "open" and not found:
                return refusal or "broken", slowest, problems
        return outcome, slowest, problems

    def call(
        self, stage: str, call: Callable[[], object]
    ) -> tuple[tuple[float, str | None], list[Problem]]:
        """Seconds and refusal of one call, and the rules it broke."""
        seconds, refusal, problems = self._once(stage, call)
        if seconds > SUSPICIOUS:
            seconds = min(seconds, *(self._once(stage, call)[0] for _ in range(2)))
        if seconds > SECONDS:
            problems.append(("slow", f"{stage} took {seconds:.1f} s"))
        return (seconds, refusal), problems

    def _once(
        self, stage: str, call: Callable[[], object]
    ) -> tuple[float, str | None, list[Problem]]:
        refusal, problems = None, list[Problem]()
        self._events.clear()
        signal.alarm(HANGS)
        start = time.perf_counter()
        self._watched = True
        try:
            call()
        except SoftcacheError as error:
            message = str(error).removeprefix(f"{self.path}: ")
            refusal = reason(message)
            if not message.isprintable() or len(message) > MESSAGE:
                problems.append(("message", f"{stage}: {ascii(message)[:200]}"))
        except Exception as error:
            problems.append(("exception", f"{stage}: {type(error).__name__}: {ascii(error)[:200]}"))
            if self.show:
                traceback.print_exc()
        finally:
            self._watched = False
        seconds = time.perf_counter() - start
        signal.alarm(0)
        if self.show:
            print(f"{stage}: {seconds:.3f} s, {refusal or problems or 'good'}", flush=True)
        problems += [("opened", f"{stage}: {event}") for event in sorted(set(self._events))]
        return seconds, refusal, problems

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._watched and event.startswith(FORBIDDEN):
            if event == "open" and str(arguments[0]) == str(self.path):
                return
            self._events.append(f"{event} {ascii(arguments)[:200]}")


def work(folder: Path, first: int, step: int, files: int, seed: int) -> None:
    """Attack with every `step`-th file, and print a line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_DATA, (PRIVATE_MEMORY, PRIVATE_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()  # so that a signal says where it struck
    faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)
    # numpy's warnings of overflow: Python opens its own source to show them
    warnings.simplefilter("ignore")
    with Attacker(folder, seed, str(first % step)) as attacker:
        for index in range(first, files, step):
            print(json.dumps(dataclasses.asdict(attacker.attack(index))), flush=True)


def read_rows(cache: Cache) -> None:
    """A few rows at the cache's temperature and another; no more values than memory takes."""
    header = cache.header
    if 3 * max(math.prod(header.positions) * header.classes, header.bytes_per_row) > VALUES:
        return
    samples = np.array([0, header.samples // 2, header.samples - 1])
    cache.rows(0, samples)
    if not isinstance(header.encoding, Sampled):
        cache.rows(header.views - 1, samples, 2.0)


def takes_long(cache: Cache) -> bool:
    """Whether it is no wonder that verify takes its time: there is that much to check."""
    header = cache.header
    if header.file_bytes - header.user_block > VERIFIED:
        return True
    return header.blocks * (header.views + 1) - cache.missing_blocks() > VERIFIED_BLOCKS


def check_text(text: str) -> None:
    """Raise SoftcacheError, whose message is not printable, for a text that steers a terminal."""
    bad = next((line for line in text.split("\n") if not line.isprintable()), None)
    if bad is not None:
        raise SoftcacheError(f"printed: \n{bad}")


def reason(message: str) -> str:
    """A message without what differs from file to file."""
    message = re.sub(r"array \w+", "array", message)
    message = re.sub(r"(lacks|begins with) .*", r"\1", message)
    return re.sub(r"[0-9][0-9,.]*|'.*|\".*| is .*;|[\[{(].*", "#", message)[:60]


def forget_peak() -> None:
    """Let peak_memory() begin anew, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes of resident memory at their highest."""
    # not ru_maxrss where there is better: a process begins with that of the one that started it
    try:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) * 1024 for line in status if line[:6] == "VmHWM:")
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


# mutations


@dataclass(frozen=True)
class Original:
    """A sound cache."""

    path: Path
    raw: bytes = field(init=False)
    text: bytes = field(init=False)  # of the header
    header: Header = field(init=False)

    def __post_init__(self) -> None:
        raw = self.path.read_bytes()
        offset, length, digest = parse_preamble(raw, len(raw))
        text = raw[offset : offset + length]
        object.__setattr__(self, "raw", raw)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "header", parse_header(text, digest, len(raw)))


NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 511, 4095, 4096, 65_535, 65_536, (1 << 31) - 1, 1 << 31, 1 << 32,
    (1 << 48) - 1, 1 << 48, 1 << 53, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64,
    -(1 << 63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
BEYOND = (10**400, -(10**400), math.inf)  # what a double cannot hold
TEXTS = (
    "", "x", "../../etc/passwd", "/etc/passwd", "C:\\x", "file:///etc/passwd", "a/b", "\x1b[31mred",
    "two\nlines", "\0", "\ud800", "\u202eright to left", "é", "x" * 5000, "NaN", "dense", "topk",
    "basis", "sampled", "quantized", "ids", "labels", "digests", "rows", "commits", "|O", "<f8", ">f2",
    "<U5", "|V8", "|S0", "|S1", "|S1024", "|S1025", "|S99999999999999999999", "<M8[s]", "|b1", "<f2,<f2",
    "softcache", "%s%n", "{0.__class__}", "__proto__",
)  # fmt: skip
LITERALS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "01", "0x10", "1_0", ".5", "5.", "+1",
    "--1", "1" * 4300, "1" * 4301, "9" * 20_000, "0." + "3" * 50_000, "1" + "0" * 350, "tru", "null",
    "{}", "[]", '{"a":1,"a":1}', '"\\ud800"', '"\\u0000"', '"\\x"', "'x'", "/**/1", "\xe9", "\x00", "\ufeff",
)  # fmt: skip
MARK = "\uf8ff"  # around text that goes into the JSON as it is


def kind_of(draw: random.Random) -> str:
    return draw.choices([*KINDS], [*KINDS.values()])[0]


def mutate(kind: str, originals: Sequence[Original], draw: random.Random) -> tuple[bytes, int]:
    """The first bytes of a hostile file, and its size: what lies beyond them is a hole."""
    original = draw.choice(originals)
    match kind:
        case "bytes":
            raw = mutate_bytes(original.raw, draw, from_start=draw.random() < 0.5)
        case "preamble":
            raw = mutate_preamble(original.raw, draw)
        case "text":
            raw = with_text(original.raw, mutate_text(original.text, draw), draw)
        case "values":
            fields = json.loads(original.text)
            for _ in range(draw.choice([1, 1, 1, 2, 4])):
                mutate_values(fields, draw)
            raw = with_text(original.raw, to_text(fields, draw), draw)
        case "arrays":
            fields = json.loads(original.text)
            for _ in range(draw.choice([1, 1, 2])):
                mutate_arrays(fields["arrays"], draw)
            raw = with_text(original.raw, to_text(fields, draw), draw)
        case _:
            return plausible(original.header, draw, hollow=kind == "hollow")
    return raw, len(raw)


def mutate_bytes(raw: bytes, draw: random.Random, *, from_start: bool = False) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 8])):
        if not changed:
            break
        at = draw.randrange(min(len(changed), 4096) if from_start else len(changed))
        size = draw.choice([1, 1, 2, 8, 64, 4096])
        match draw.randrange(7):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at : at + size] = draw.randbytes(size)
            case 2:
                changed[at : at + size] = bytes(size)
            case 3:
                changed[at : at + size] = b""
            case 4:
                changed[at:at] = changed[draw.randrange(len(changed)) :][:size]
            case 5:
                del changed[at:]
            case _:
                changed += draw.randbytes(size)
    return bytes(changed)


def mutate_preamble(raw: bytes, draw: random.Random) -> bytes:
    magic, *numbers = PREAMBLE.unpack(raw[: PREAMBLE.size])
    for _ in range(draw.choice([1, 1, 2])):
        near = draw.choice(numbers) + draw.randint(-40, 40)
        edge = draw.choice(
            [near, len(raw), len(raw) - 32, draw.getrandbits(64), draw.getrandbits(17)]
        )
        number = draw.choice([edge, draw.choice([n for n in NUMBERS if isinstance(n, int)])])
        numbers[draw.randrange(3)] = number % (1 << 64)
    text = raw[numbers[0] : numbers[0] + min(numbers[1], len(raw))] if draw.random() < 0.5 else b""
    digest = PREAMBLE.unpack(preamble(0, text))[3] if text else numbers[2]
    return PREAMBLE.pack(magic, numbers[0], numbers[1], digest) + raw[PREAMBLE.size :]


def with_text(raw: bytes, text: bytes, draw: random.Random) -> bytes:
    """The file with another header, and a preamble that fits it."""
    at = PREAMBLE.size
    if len(text) > len(raw) // 2 or draw.random() < 0.05:
        return preamble(len(raw), text) + raw[at:] + text
    return preamble(at, text) + text + raw[at + len(text) :]


def mutate_text(text: bytes, draw: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(changed) + 1)
        to = min(len(changed), at + draw.choice([1, 1, 4, 30, 500]))
        depth = draw.choice(
            [draw.randint(2, 50), draw.randint(400, 1100), draw.randint(1, 400_000)]
        )
        match draw.randrange(8):
            case 0:
                del changed[at:to]
            case 1:
                changed[at:at] = changed[at:to]
            case 2:
                changed[at:to] = draw.choice(LITERALS).encode("utf-8")
            case 3:
                changed[at:at] = draw.choice([b"[", b'{"a":', b"[[]", b"]", b"}"]) * depth
            case 4:  # in place of a number
                numbers = [m.span() for m in re.finditer(rb"(?<=[:,\[])[0-9.]+", bytes(changed))]
                low, high = draw.choice(numbers or [(at, to)])
                nested = b"[" * min(depth, 2000) + b"]" * min(depth, 2000)
                changed[low:high] = draw.choice([nested, draw.choice(LITERALS).encode("utf-8")])
            case 5:  # a key twice
                changed[1:1] = draw.choice(
                    [b'"views":2,', b'"format":"softcache",', b'"x":1,"x":1,']
                )
            case 6:
                changed[at:to] = draw.randbytes(to - at)
            case _:
                changed += draw.choice([b"x", b"{}", b"\0", b" " * (1 << 20), bytes(changed)])
    return bytes(changed)


def mutate_values(fields: dict[str, Any], draw: random.Random) -> None:
    """Change a value anywhere in the header."""
    inside, key = any_place(fields, draw)
    match draw.randrange(10):
        case 0 | 1 | 2 | 3:
            inside[key] = evil(inside[key], draw)
        case 4:
            inside[key] = evil(None, draw)
        case 5:
            other, way = any_place(fields, draw)
            inside[key] = json.loads(json.dumps(other[way]))
        case 6:
            del inside[key]
        case 7 if isinstance(inside, dict):
            inside[draw.choice(TEXTS)] = inside.pop(key)
        case 8 if isinstance(inside, dict):
            inside[draw.choice(["x", "must_understand", "k", "n", "top", *TEXTS])] = evil(
                None, draw
            )
        case 8 | 7:
            inside.insert(0, evil(inside[0], draw))
        case _:
            news = [draw.choice(TEXTS) for _ in range(draw.choice([1, 3]))]
            version = [draw.choice([0, 1, 2, 99]), draw.choice([0, 1, 1, 65_535])]
            fields |= draw.choice([{"must_understand": news}, {"version": version}])


def any_place(fields: dict[str, Any], draw: random.Random) -> tuple[Any, Any]:
    """A value's container and its key there: a field first, so that arrays are not most of them."""
    if not fields:
        fields["format"] = None
    # what the encoding's code makes of its parameters deserves a closer look
    name = draw.choice([*fields, *["encoding"] * (5 if "encoding" in fields else 0)])
    inside = list(places(fields[name])) if isinstance(fields[name], dict | list) else []
    return draw.choice([(fields, name), *inside])


def places(value: Container) -> Iterator[tuple[Any, Any]]:
    """Every value inside a JSON value, as its container and its key there."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def evil(old: object, draw: random.Random) -> object:
    """A value for the place of `old`: often of its type, at an edge of what is allowed."""
    literal = MARK + draw.choice(LITERALS) + MARK
    depth = draw.choice([draw.randint(1, 40), draw.randint(700, 1100)])
    deep = (
        MARK + draw.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]) + MARK
    )
    others = [None, True, False, [], {}, literal, deep, [0] * 9, {"name": "x"}, list(range(20_000))]
    number, text = draw.choice([draw.choice(NUMBERS), *BEYOND]), draw.choice(TEXTS)
    if draw.random() < 0.3:
        return draw.choice([*others, number, text])
    if isinstance(old, bool) or old is None:
        return draw.choice([number, text, {"asked": text}, {text: text}])
    if isinstance(old, int | float):
        as_float = float(old) if abs(old) < 1e300 else 0.5
        near = old + draw.randint(-2, 2)
        return draw.choice([near, number, old * 2, -old, as_float, old // 2, literal])
    if isinstance(old, str):
        return draw.choice([text, old + text, old[:-1], old * 2, old.upper()])
    if isinstance(old, list):
        return draw.choice(
            [old * 2, old[::-1], old[1:], [*old, number], [number] * 3, [old], [text]]
        )
    assert isinstance(old, dict)  # JSON holds nothing else
    return draw.choice([{}, {**old, text: number}, {text: old}, [old]])


def mutate_arrays(arrays: list[Any], draw: random.Random) -> None:
    """Change what the header says of arrays: the kind of lie that makes a reader look elsewhere."""
    if not arrays:
        return
    one, other = draw.choice(arrays), draw.choice(arrays)
    offset = one["offset"]
    match draw.randrange(10):
        case 0:
            edges = [0, 32, 511, 65_535, offset - 1, offset + 1, offset + 4096, other["offset"]]
            one["offset"] = draw.choice([*edges, *(n for n in NUMBERS if isinstance(n, int))])
        case 1:
            one["offset"], other["offset"] = other["offset"], offset
        case 2:
            at = draw.randrange(len(one["shape"])) if one["shape"] else 0
            sizes = [draw.choice(NUMBERS), draw.choice([1 << 20, 1 << 31, 1 << 47])]
            one["shape"][at : at + 1] = draw.choice([sizes[:1], sizes[1:], sizes, []])
        case 3:
            one["dtype"] = draw.choice([*sorted(DTYPES), *TEXTS])
        case 4:
            one["name"] = draw.choice([other["name"], *TEXTS])
        case 5:
            one["axis"] = draw.choice(["rows", "samples", "shared", "commits", *TEXTS])
        case 6:
            arrays.append(json.loads(json.dumps(one)))
        case 7:
            arrays.remove(one)
        case 8:
            draw.shuffle(arrays)
        case _:
            arrays[:] = arrays * draw.choice([2, 10, 200])


def to_text(fields: dict[str, Any], draw: random.Random) -> bytes:
    # 10**400 and the like are numbers that json writes; beyond 4,300 digits they come as literals
    text = json.dumps(fields, ensure_ascii=draw.random() < 0.9)
    mark = json.dumps(MARK)[1:-1]
    text = re.sub(
        f'"(?:{re.escape(mark)}|{MARK})([^"]*?)(?:{re.escape(mark)}|{MARK})"', unquoted, text
    )
    return text.encode("utf-8", "surrogatepass")


def unquoted(found: re.Match[str]) -> str:
    return str(json.loads(f'"{found[1]}"'))


def plausible(header: Header, draw: random.Random, *, hollow: bool) -> tuple[bytes, int]:
    """A file that keeps the rules of the header but for what random bytes break."""

    def size(most: int) -> int:
        huge = hollow and draw.random() < 0.4
        return min(most, draw.randint(1, 1 << draw.randint(1, 40))) if huge else draw.randint(1, 40)

    classes = size((1 << 31) - 1) + 1
    encoding = any_encoding(classes, draw)
    samples, views = size(1 << 40), size(1 << 20)
    positions = tuple(size(1 << 20) for _ in range(draw.choice([0, 0, 0, 1, 2])))
    block_rows = draw.choice([1, samples, draw.randint(1, samples)])
    blocks = -(-samples // block_rows)
    wanted = expected_arrays(
        encoding,
        views=views,
        samples=samples,
        positions=positions,
        classes=classes,
        name_bytes=draw.choice([1, 3, 1024]),
        fingerprinted=size(1 << 30),
    )
    wanted += digest_arrays(views, blocks).values()
    draw.shuffle(wanted)
    user_block = 1 << (draw.randint(16, 41) if hollow else 16)
    end, arrays = user_block, []
    for spec, shape in wanted:
        offset = end + draw.choice([0, 0, 1, 8, 4096])  # an odd one is allowed
        arrays.append(Array(spec.name, spec.dtype, shape, spec.axis, offset))
        end = offset + arrays[-1].nbytes
    end += draw.choice([0, 1, 4096])
    limit = HOLLOW if hollow else 1 << 22
    if end > limit:
        return plausible(header, draw, hollow=hollow)
    text = dataclasses.replace(
        header,
        views=views,
        samples=samples,
        positions=positions,
        classes=classes,
        temperature=draw.choice([1.0, 4.0, 1e-3, 999_999.0, 5e-324]),
        encoding=encoding,
        block_rows=block_rows,
        user_block=user_block,
        file_bytes=end,
        arrays=tuple(arrays),
        summary=draw.choice([None, header.summary]),
    ).to_bytes()
    front = preamble(PREAMBLE.size, text) + text
    if hollow:
        return front, end
    rest = end - len(front)
    pattern = draw.choice([draw.randbytes(rest), bytes(rest), b"\xff" * rest, b"\x00\x7c" * rest])
    return front + pattern[:rest], end


def any_encoding(classes: int, draw: random.Random) -> Encoding:
    """One that fits so many classes."""
    few = draw.randint(1, min(classes - 1, 60))
    temperatures = draw.choice([(1.0,), (1.0, 2.0, 4.0, 8.0), (5e-324, 1e-300), (1e5, 999_999.0)])
    made: list[Encoding] = [
        Dense(),
        Quantized(),
        TopK(few, temperatures),
        Sampled(draw.choice([1, few, 1000, 65_536])),
    ]
    if classes >= 4:
        wide, narrow = draw.randint(0, min(classes // 2, 40)), 2 * draw.randint(0, classes // 4)
        made.append(Basis(max(wide, 1), min(narrow, 40), few))
    return draw.choice(made)


if __name__ == "__main__":
    if len(sys.argv) == 6 and sys.argv[1][:1] != "-":
        work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        main()

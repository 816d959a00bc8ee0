"""Mutated headers and files, as an attacker could send them, given to everything that reads a cache.

Worker processes with little memory open each file, describe it as `softcache info` does, read a few rows
and verify it. None of these may happen: a signal, a call that takes more than a second, more than 300 MB
of memory, opening any file but the cache, an exception that is not softcache's own, a message of more than
one line, or printing a character from the file that could control a terminal.

    bytes      bits, words and spans of the file changed, cut or added; digests are not adapted
    preamble   another offset, length or digest of the header
    text       the header's JSON cut or duplicated, or with constants, brackets or huge numbers inserted
    values     values of the header replaced (also by subtrees of it), removed or renamed
    arrays     offsets, shapes, dtypes, names and axes of arrays changed, exchanged or duplicated
    plausible  a valid header with any encoding and sizes, over random bytes
    hollow     the same with huge sizes, in a sparse file of up to 4 TB

From `text` on, the header's digest is correct. Files and results depend only on --seed and the number of
the file; `--index N --folder DIR` makes file N again, keeps it and shows what happens. Private memory is
limited (RLIMIT_DATA), not address space, since mapping a large file takes none of the former; the peak is
resident memory, which includes pages of the mapped file.
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
from softcache.cache.array_spec import DTYPES
from softcache.cache.arrays import digest_arrays, expected_arrays
from softcache.cache.header import PREAMBLE, parse_header, parse_preamble, preamble
from softcache.cache.reader import Cache, open_cache
from softcache.cache.verify import find_damage
from softcache.errors import SoftcacheError
from softcache.files.describe import describe

# workers run this file as a script and never import torch, whose memory would hide a peak; for the same
# reason, only the parent imports from tests.bench

KINDS = {
    "bytes": 4, "preamble": 2, "text": 3, "values": 5, "arrays": 3, "plausible": 3, "hollow": 1,
}  # fmt: skip  # relative frequencies
SECONDS = 1.0  # limit for one call
SUSPICIOUS = SECONDS / 2  # slower calls are repeated, in case the machine was busy
HANGS = 10  # seconds until SIGALRM
PEAK = 300_000_000  # limit in bytes
PRIVATE_MEMORY = 1 << 30  # bytes
HOLLOW = 1 << 42  # bytes, at most
# files with more bytes after the user block, or more committed blocks, are not verified
VERIFIED, VERIFIED_BLOCKS = 1 << 24, 1 << 14
VALUES = 1 << 20  # rows with more values are not read
MESSAGE = 600  # limit in characters
FORBIDDEN = (
    "open", "import", "exec", "os.", "shutil.", "socket.", "subprocess.", "ctypes.", "pickle.",
)  # fmt: skip  # audit events; os.open() itself is "open"

# a broken rule: its name in the table, and what happened
Problem = tuple[str, str]
Container = dict[Any, Any] | list[Any]


@dataclass(frozen=True)
class Report:
    """What happened with one file."""

    index: int
    kind: str
    outcome: str  # "opened", or the reason of the refusal
    seconds: float  # time of its slowest call
    peak: int  # resident memory in bytes
    problems: list[Problem]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="make only this file, kept in --folder")
    parser.add_argument("--reasons", action="store_true", help="list the reasons for refusals")
    parser.add_argument("--folder", type=Path, help="folder for files [default: a temporary one]")
    options = parser.parse_args()
    from tests.bench import machine, work_folder
    from tests.bench.corruptions import small_caches

    with work_folder(options.folder) as folder:
        (folder / "seeds").mkdir(exist_ok=True)
        small_caches(folder / "seeds")
        self_check(folder)
        if options.index is not None:
            print(attack_once(folder, options.seed, options.index))
            return
        reports = campaign(folder, options.files, options.workers, options.seed)
        print(f"{options.files:,} files, seed {options.seed}; {machine()}\n")
    if summary(reports, options.reasons):
        raise SystemExit("\na rule was broken; inspect a file with --index N --folder DIR")


# the parent


def campaign(folder: Path, files: int, workers: int, seed: int) -> list[Report]:
    """The reports on all files, from `workers` workers that share them."""
    reports: list[list[Report]] = [[] for _ in range(workers)]
    threads = [
        threading.Thread(target=attend, args=(folder, first, workers, files, seed, reports[first]))
        for first in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sorted_reports = sorted((r for share in reports for r in share), key=lambda r: r.index)
    if [report.index for report in sorted_reports] != list(range(files)):
        raise SystemExit(
            f"{len(sorted_reports):,} of {files:,} files have a report; fix this benchmark"
        )
    return sorted_reports


def attend(
    folder: Path, first: int, step: int, files: int, seed: int, reports: list[Report]
) -> None:
    """Run a worker on every `step`-th file; if it dies, start another after the file that killed it."""
    index = first
    while index < files:
        numbers = map(str, (index, step, files, seed))
        command = [sys.executable, "-P", __file__, str(folder), *numbers]
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
            index = reports[-1].index + step
            if index % 5000 < step:
                print(f"{index:,} of {files:,} files", file=sys.stderr, flush=True)
        errors, code = process.stderr.read(), process.wait()
        process.stdout.close()
        process.stderr.close()
        if code or index < files:  # the file without a report killed it
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            kind = kind_of(random.Random(f"{seed} {index}"))
            frames = re.findall(r'File ".*?(\w+\.py)", line (\d+) in (\w+)', errors)
            stack = " < ".join(f"{file}:{line} {function}" for file, line, function in frames[:4])
            problem = ("signal", f"{name}: {stack or ascii(errors[-300:])}")
            reports.append(Report(index, kind, "died", 0.0, 0, [problem]))
            index += step


def summary(reports: Sequence[Report], reasons: bool) -> bool:
    """Print the tables; returns whether a rule was broken."""
    from tabulate import tabulate

    rules = ("signal", "slow", "memory", "opened", "exception", "message")
    lines = []
    for kind in [*KINDS, "all"]:
        of_kind = [report for report in reports if kind in (report.kind, "all")]
        broken = Counter(rule for r in of_kind for rule in {rule for rule, _ in r.problems})
        slowest = max((report.seconds for report in of_kind), default=0.0)
        opened = sum(report.outcome == "opened" for report in of_kind)
        counts = (broken[rule] for rule in rules)
        lines.append((kind, len(of_kind), opened, f"{1000 * slowest:,.1f}", *counts))
    headers = ("kind", "files", "opened", "slowest call, ms", *rules)
    print(tabulate(lines, headers=headers, intfmt=","))
    print(f"\npeak memory: {max(r.peak for r in reports) / 1e6:,.0f} MB")
    outcomes = Counter(report.outcome for report in reports)
    print(f"different reasons for refusals: {len(outcomes) - 1}")
    if reasons:
        print(tabulate(outcomes.most_common(), headers=("outcome", "files"), intfmt=","))
    examples: dict[str, list[str]] = {}
    for report in reports:
        for rule, what in report.problems:
            text = f"  file {report.index}, {report.kind}: {what}"
            pattern = re.split(r"['\"(]", re.sub("[0-9.]+", "#", what))[0]
            examples.setdefault(f"{rule} {pattern}", []).append(text)
    for texts in examples.values():
        print(f"{len(texts)} times:\n" + "\n".join(texts[:2]))
    return bool(examples)


def attack_once(folder: Path, seed: int, index: int) -> Report:
    """Make one file again, and show what happens with it."""
    with Attacker(folder, seed, str(os.getpid())) as attacker:
        attacker.show = True
        report = attacker.attack(index)
        print(f"{attacker.path} is kept")
    return report


def self_check(folder: Path) -> None:
    """Stop unless every broken rule is noticed."""

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
                raise SystemExit(
                    f"the broken rule {rule!r} is reported as {problems}; fix this benchmark"
                )
        _, problems = attacker.call("info", lambda: check_text("\x1b[31mred"))
        if [broken for broken, _ in problems] != ["message"]:
            raise SystemExit("a terminal control character is not noticed; fix this benchmark")


# the worker


class Attacker:
    """Makes files and watches what the reader does with them; a context manager, for its audit hook."""

    def __init__(self, folder: Path, seed: int, name: str) -> None:
        self.seeds = [Original(path) for path in sorted((folder / "seeds").glob("*.h5"))]
        self.seed = seed
        self.path = folder / f"hostile-{name}.h5"
        self.show = False
        self._watched = False
        self._events: list[str] = []
        for original in self.seeds:  # so that everything is imported before the hook watches
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
        """Make a file, and run all stages on it."""
        draw = random.Random(f"{self.seed} {index}")
        kind = kind_of(draw)
        raw, size = mutate(kind, self.seeds, draw)
        self.path.unlink(missing_ok=True)  # a file that is still mapped must not change
        with self.path.open("wb") as file:
            file.write(raw)
            file.truncate(size)
        reset_peak()
        outcome, seconds, problems = self._stages()
        peak = peak_memory()
        if peak > PEAK:
            problems.append(("memory", f"{peak:,} bytes"))
        return Report(index, kind, outcome, seconds, peak, problems)

    def _stages(self) -> tuple[str, float, list[Problem]]:
        """Outcome, seconds of the slowest call, and broken rules of the file."""
        caches: list[Cache] = []

        def open_file() -> None:
            caches[:] = [open_cache(self.path, unfinished=True)]

        stages: dict[str, Callable[[], object]] = {
            "open": open_file,
            "info": lambda: check_text(describe(caches[0])),
            "rows": lambda: read_rows(caches[0]),
            "verify": lambda: takes_long(caches[0]) or find_damage(caches[0]),
        }
        slowest, problems, outcome = 0.0, list[Problem](), "opened"
        for stage, call in stages.items():
            (seconds, refusal), broken = self.call(stage, call)
            slowest, problems = max(slowest, seconds), problems + broken
            if stage == "open" and not caches:
                return refusal or "broken", slowest, problems
        return outcome, slowest, problems

    def call(
        self, stage: str, call: Callable[[], object]
    ) -> tuple[tuple[float, str | None], list[Problem]]:
        """Seconds and reason of refusal of one call, and the rules it broke."""
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
    """Make every `step`-th file, and print the report on each as a line of JSON."""
    resource.setrlimit(resource.RLIMIT_DATA, (PRIVATE_MEMORY, PRIVATE_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()  # so that a signal prints a traceback
    faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)
    # to show a warning, such as numpy's of an overflow, Python opens its own source files
    warnings.simplefilter("ignore")
    with Attacker(folder, seed, str(first % step)) as attacker:
        for index in range(first, files, step):
            print(json.dumps(dataclasses.asdict(attacker.attack(index))), flush=True)


def read_rows(cache: Cache) -> None:
    """Read a few rows at the cache's temperature and at another, unless they are too large for memory."""
    header = cache.header
    if 3 * max(math.prod(header.positions) * header.classes, header.bytes_per_row) > VALUES:
        return
    samples = np.array([0, header.samples // 2, header.samples - 1])
    cache.rows(0, samples)
    if not isinstance(header.encoding, Sampled):
        cache.rows(header.views - 1, samples, 2.0)


def takes_long(cache: Cache) -> bool:
    """Whether there is so much to verify that it may take more than a second."""
    header = cache.header
    if header.file_bytes - header.user_block > VERIFIED:
        return True
    return header.blocks * (header.views + 1) - cache.missing_blocks() > VERIFIED_BLOCKS


def check_text(text: str) -> None:
    """Raise a SoftcacheError with a message that is not printable if `text` could control a terminal."""
    bad = next((line for line in text.split("\n") if not line.isprintable()), None)
    if bad is not None:
        raise SoftcacheError(f"printed: \n{bad}")


def reason(message: str) -> str:
    """A message without the values that differ from file to file."""
    message = re.sub(r"array \w+", "array", message)
    message = re.sub(r"(lacks|begins with) .*", r"\1", message)
    return re.sub(r"[0-9][0-9,.]*|'.*|\".*| is .*;|[\[{(].*", "#", message)[:60]


def reset_peak() -> None:
    """Reset the value of peak_memory(), if the system supports that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory in bytes."""
    # VmHWM if there is one, since ru_maxrss is inherited from the parent process
    try:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) * 1024 for line in status if line[:6] == "VmHWM:")
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


# mutations


@dataclass(frozen=True)
class Original:
    """An intact cache, from which mutated ones are made."""

    path: Path
    raw: bytes = field(init=False)
    text: bytes = field(init=False)  # the header's JSON
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
BEYOND = (10**400, -(10**400), math.inf)  # numbers beyond the range of a double
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
MARK = "\uf8ff"  # encloses text that is inserted into the JSON verbatim


def kind_of(draw: random.Random) -> str:
    return draw.choices([*KINDS], [*KINDS.values()])[0]


def mutate(kind: str, originals: Sequence[Original], draw: random.Random) -> tuple[bytes, int]:
    """The first bytes of a hostile file, and the size of the file; the rest of it is a hole."""
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
        start = draw.randrange(min(len(changed), 4096) if from_start else len(changed))
        size = draw.choice([1, 1, 2, 8, 64, 4096])
        match draw.randrange(7):
            case 0:
                changed[start] ^= 1 << draw.randrange(8)
            case 1:
                changed[start : start + size] = draw.randbytes(size)
            case 2:
                changed[start : start + size] = bytes(size)
            case 3:
                changed[start : start + size] = b""
            case 4:
                changed[start:start] = changed[draw.randrange(len(changed)) :][:size]
            case 5:
                del changed[start:]
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
    """The file with another header, and a matching preamble."""
    offset = PREAMBLE.size
    if len(text) > len(raw) // 2 or draw.random() < 0.05:
        return preamble(len(raw), text) + raw[offset:] + text
    return preamble(offset, text) + text + raw[offset + len(text) :]


def mutate_text(text: bytes, draw: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(draw.choice([1, 1, 2, 5])):
        start = draw.randrange(len(changed) + 1)
        stop = min(len(changed), start + draw.choice([1, 1, 4, 30, 500]))
        depth = draw.choice(
            [draw.randint(2, 50), draw.randint(400, 1100), draw.randint(1, 400_000)]
        )
        match draw.randrange(8):
            case 0:
                del changed[start:stop]
            case 1:
                changed[start:start] = changed[start:stop]
            case 2:
                changed[start:stop] = draw.choice(LITERALS).encode("utf-8")
            case 3:
                changed[start:start] = draw.choice([b"[", b'{"a":', b"[[]", b"]", b"}"]) * depth
            case 4:  # instead of a number
                numbers = [m.span() for m in re.finditer(rb"(?<=[:,\[])[0-9.]+", bytes(changed))]
                low, high = draw.choice(numbers or [(start, stop)])
                nested = b"[" * min(depth, 2000) + b"]" * min(depth, 2000)
                changed[low:high] = draw.choice([nested, draw.choice(LITERALS).encode("utf-8")])
            case 5:  # a repeated key
                changed[1:1] = draw.choice(
                    [b'"views":2,', b'"format":"softcache",', b'"x":1,"x":1,']
                )
            case 6:
                changed[start:stop] = draw.randbytes(stop - start)
            case _:
                changed += draw.choice([b"x", b"{}", b"\0", b" " * (1 << 20), bytes(changed)])
    return bytes(changed)


def mutate_values(fields: dict[str, Any], draw: random.Random) -> None:
    """Change a value anywhere in the header."""
    container, key = any_value(fields, draw)
    match draw.randrange(10):
        case 0 | 1 | 2 | 3:
            container[key] = evil(container[key], draw)
        case 4:
            container[key] = evil(None, draw)
        case 5:
            other_container, other_key = any_value(fields, draw)
            container[key] = json.loads(json.dumps(other_container[other_key]))
        case 6:
            del container[key]
        case 7 if isinstance(container, dict):
            container[draw.choice(TEXTS)] = container.pop(key)
        case 8 if isinstance(container, dict):
            container[draw.choice(["x", "must_understand", "k", "n", "top", *TEXTS])] = evil(
                None, draw
            )
        case 8 | 7:
            container.insert(0, evil(container[0], draw))
        case _:
            features = [draw.choice(TEXTS) for _ in range(draw.choice([1, 3]))]
            version = [draw.choice([0, 1, 2, 99]), draw.choice([0, 1, 1, 65_535])]
            fields |= draw.choice([{"must_understand": features}, {"version": version}])


def any_value(fields: dict[str, Any], draw: random.Random) -> tuple[Any, Any]:
    """The container and the key of a random value. A field is drawn first, or arrays would dominate."""
    if not fields:
        fields["format"] = None
    # parameters of the encoding are drawn more often, since the most code depends on them
    name = draw.choice([*fields, *["encoding"] * (5 if "encoding" in fields else 0)])
    nested = list(values_in(fields[name])) if isinstance(fields[name], dict | list) else []
    return draw.choice([(fields, name), *nested])


def values_in(value: Container) -> Iterator[tuple[Any, Any]]:
    """The container and the key of every value inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from values_in(value[key])


def evil(old: object, draw: random.Random) -> object:
    """A replacement for `old`: often of its type, at an edge of what is allowed."""
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
    """Change the header's list of arrays, so that a reader would look at the wrong bytes."""
    if not arrays:
        return
    array, other = draw.choice(arrays), draw.choice(arrays)
    offset = array["offset"]
    match draw.randrange(10):
        case 0:
            edges = [0, 32, 511, 65_535, offset - 1, offset + 1, offset + 4096, other["offset"]]
            array["offset"] = draw.choice([*edges, *(n for n in NUMBERS if isinstance(n, int))])
        case 1:
            array["offset"], other["offset"] = other["offset"], offset
        case 2:
            axis = draw.randrange(len(array["shape"])) if array["shape"] else 0
            sizes = [draw.choice(NUMBERS), draw.choice([1 << 20, 1 << 31, 1 << 47])]
            array["shape"][axis : axis + 1] = draw.choice([sizes[:1], sizes[1:], sizes, []])
        case 3:
            array["dtype"] = draw.choice([*sorted(DTYPES), *TEXTS])
        case 4:
            array["name"] = draw.choice([other["name"], *TEXTS])
        case 5:
            array["axis"] = draw.choice(["rows", "samples", "shared", "commits", *TEXTS])
        case 6:
            arrays.append(json.loads(json.dumps(array)))
        case 7:
            arrays.remove(array)
        case 8:
            draw.shuffle(arrays)
        case _:
            arrays[:] = arrays * draw.choice([2, 10, 200])


def to_text(fields: dict[str, Any], draw: random.Random) -> bytes:
    """The header's JSON, with text between MARKs inserted verbatim."""
    text = json.dumps(fields, ensure_ascii=draw.random() < 0.9)
    mark = json.dumps(MARK)[1:-1]
    text = re.sub(
        f'"(?:{re.escape(mark)}|{MARK})([^"]*?)(?:{re.escape(mark)}|{MARK})"', unquoted, text
    )
    return text.encode("utf-8", "surrogatepass")


def unquoted(match: re.Match[str]) -> str:
    return str(json.loads(f'"{match[1]}"'))


def plausible(header: Header, draw: random.Random, *, hollow: bool) -> tuple[bytes, int]:
    """A file with a valid header, over random bytes."""

    def size(limit: int) -> int:
        if hollow and draw.random() < 0.4:
            return min(limit, draw.randint(1, 1 << draw.randint(1, 40)))
        return draw.randint(1, 40)

    classes = size((1 << 31) - 1) + 1
    encoding = any_encoding(classes, draw)
    samples, views = size(1 << 40), size(1 << 20)
    positions = tuple(size(1 << 20) for _ in range(draw.choice([0, 0, 0, 1, 2])))
    block_rows = draw.choice([1, samples, draw.randint(1, samples)])
    blocks = -(-samples // block_rows)
    described = dataclasses.replace(
        header,
        views=views,
        samples=samples,
        positions=positions,
        classes=classes,
        encoding=encoding,
    )
    specs = expected_arrays(
        described,
        name_bytes=draw.choice([1, 3, 1024]),
        fingerprinted=size(1 << 30),
    )
    specs += digest_arrays(views, blocks).values()
    draw.shuffle(specs)
    user_block = 1 << (draw.randint(16, 41) if hollow else 16)
    end, arrays = user_block, []
    for spec, shape in specs:
        offset = end + draw.choice([0, 0, 1, 8, 4096])  # offsets need not be aligned
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
    """A random encoding that is valid for this number of classes."""
    k = draw.randint(1, min(classes - 1, 60))
    temperatures = draw.choice([(1.0,), (1.0, 2.0, 4.0, 8.0), (5e-324, 1e-300), (1e5, 999_999.0)])
    encodings: list[Encoding] = [
        Dense(),
        Quantized(),
        TopK(k, temperatures),
        Sampled(draw.choice([1, k, 1000, 65_536])),
    ]
    if classes >= 4:
        wide, narrow = draw.randint(0, min(classes // 2, 40)), 2 * draw.randint(0, classes // 4)
        encodings.append(Basis(max(wide, 1), min(narrow, 40), k))
    return draw.choice(encodings)


if __name__ == "__main__":
    if len(sys.argv) == 6 and sys.argv[1][:1] != "-":
        work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        main()

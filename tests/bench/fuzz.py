"""Mutated caches, run folders and checkpoints, given to every command that reads them.

The files are well-formed where hostile.py's are not: all digests are mended, so that what they protect is
reached. Worker processes write each input into a folder and run the commands on it. None of these may happen:

    signal     the process dies
    traceback  an exception that the command line does not turn into an error message
    slow       a call takes more than 2 seconds
    memory     a call takes more than 300 MB on top of what the process had
    message    an error that is not one line, or output with a character that could control a terminal
    markup     a page with a script in it
    code       code that the input names is run
    silent     verify or train accepts a cache whose rows are no distributions or whose labels are no classes,
               or a run ends with weights that are not finite

Kinds of inputs: in a cache, `values` of arrays of numbers, class `ids`, `labels`, `keys`, `names` of classes,
embedded `inputs` and fields of the `header`; in a run folder, its `config`, `metrics` and `weights`; in the
checkpoint of an interrupted run, the `state` in its metadata, its `tensors` and its `bytes`.

Inputs and commands depend only on --seed and the number of the input; `--index N --folder DIR` makes input N
again, keeps it in DIR and shows what happens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from tabulate import tabulate

from softcache.cli.app import main as softcache
from softcache.train.run_folder import WEIGHTS
from tests.bench import machine, work_folder
from tests.bench.fuzz_inputs import ENCODINGS, KINDS, Input, make_input, make_seeds
from tests.bench.hostile import peak_memory, reset_peak

RULES = ("signal", "traceback", "slow", "memory", "message", "markup", "code", "silent")
SECONDS = 2.0  # limit for one call
SUSPICIOUS = SECONDS / 2  # inputs with a slower call are repeated, in case the machine was busy
HANGS = 20  # seconds until SIGALRM
MEMORY = 300_000_000  # bytes
PRIVATE_MEMORY = 2 << 30  # bytes on top of what a worker has, so that the machine survives
NO_MEMORY = re.compile("allocate memory|Unable to allocate|MemoryError|failed to allocate")
MESSAGE = 1000  # limit in characters
FRESH = 5_000  # inputs of a worker, whose memory grows slowly
EVIL = """
from pathlib import Path

Path({marker!r}).touch()

def make(*arguments, **options):
    raise ValueError("code was run")
"""

Problem = tuple[str, str]  # a broken rule, and what happened


@dataclass(frozen=True)
class Result:
    """What one command did.

    Attributes:
        code: its exit code; None if it raised.
        seconds: how long it took.
        growth: by how many bytes its peak was above the memory before it.
        crash: the exception, with the innermost function of softcache; None if there was none.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    growth: int
    crash: str | None


@dataclass(frozen=True)
class Report:
    """What happened with one input."""

    index: int
    kind: str
    change: str
    outcome: str  # accepted, refused or died
    seconds: float  # of its slowest call
    problems: list[Problem]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", type=int, help="make only this input, kept in --folder")
    parser.add_argument("--folder", type=Path, help="folder for files [default: a temporary one]")
    parser.add_argument(
        "--log", type=Path, help="reports as JSON lines, from which a rerun continues"
    )
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)  # first, step, stop
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.seed, *options.work)
        return
    with work_folder(options.folder and options.folder.resolve()) as folder:
        if options.index is not None:
            with Attacker(folder, options.seed, show=True) as attacker:
                self_check(attacker)
                print(attacker.attack(options.index))
                print(f"{attacker.folder} is kept")
            return
        with Attacker(folder, options.seed) as attacker:
            self_check(attacker)
        start = time.monotonic()
        reports = campaign(folder, options.inputs, options.jobs, options.seed, options.log)
        rate = options.inputs / (time.monotonic() - start)
        print(f"{options.inputs:,} inputs, seed {options.seed}, {rate:.1f} inputs/s; {machine()}\n")
    if summary(reports):
        raise SystemExit("\na rule was broken; see an input with --index N --folder DIR")


# the parent


def campaign(
    folder: Path, inputs: int, jobs: int, seed: int, log: Path | None = None
) -> list[Report]:
    """The reports on all inputs, from `jobs` workers that share them."""
    reports: list[list[Report]] = [[] for _ in range(jobs)]
    for line in log.read_text().splitlines() if log and log.exists() else []:
        report = report_from(json.loads(line))
        reports[report.index % jobs].append(report)
    threads = [
        threading.Thread(
            target=attend, args=(folder, first, jobs, inputs, seed, reports[first], log)
        )
        for first in range(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    merged = sorted((report for part in reports for report in part), key=lambda r: r.index)
    if [report.index for report in merged] != list(range(inputs)):
        raise SystemExit(f"{len(merged):,} of {inputs:,} inputs have a report; fix this benchmark")
    return merged


def attend(
    folder: Path,
    first: int,
    step: int,
    inputs: int,
    seed: int,
    reports: list[Report],
    log: Path | None,
) -> None:
    """Run workers on every `step`-th input; one that dies is replaced, after the input that killed it."""
    index = reports[-1].index + step if reports else first

    def add(report: Report) -> None:
        reports.append(report)
        if log:
            with log.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(report)) + "\n")

    place = folder / f"worker-{first}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    while index < inputs:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        stop = min(inputs, index + FRESH * step)
        numbers = [str(number) for number in (index, step, stop)]
        command = [
            sys.executable, "-m", "tests.bench.fuzz", "--folder", str(place), "--seed", str(seed),
            "--work", *numbers,
        ]  # fmt: skip
        with (place / "stderr.txt").open("w") as errors:  # a pipe that nobody reads would fill up
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                add(report_from(json.loads(line)))
                index = reports[-1].index + step
                if index % 1000 < step:
                    print(f"{index:,} of {inputs:,} inputs", file=sys.stderr, flush=True)
        code = process.wait()
        if index < stop:  # the input without a report killed it
            text = (place / "stderr.txt").read_text(errors="replace")
            started = (place / "started.json").exists()
            if not started or "fix this benchmark" in text:
                # in a thread, SystemExit would go unnoticed
                print(f"a worker failed:\n{text[-2000:]}", file=sys.stderr)
                return
            add(obituary(place, index, code, text))
            index += step


def report_from(fields: dict[str, Any]) -> Report:
    """A report from a line that a worker or an earlier campaign has written."""
    problems = [(str(rule), str(what)) for rule, what in fields.pop("problems")]
    return Report(**fields, problems=problems)


def obituary(place: Path, index: int, code: int, errors: str) -> Report:
    """The report on the input that killed a worker."""
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    frames = re.findall(r'File ".*?(\w+/\w+\.py)", line (\d+) in (\w+)', errors)
    stack = " < ".join(f"{file}:{line} {function}" for file, line, function in frames[:4])
    kind, change, command = json.loads((place / "started.json").read_text())
    what = f"{command}: {name}: {stack or ascii(errors[-300:])}"
    return Report(index, kind, change, "died", 0.0, [("signal", what)])


def summary(reports: Sequence[Report]) -> bool:
    """Print the tables; returns whether a rule was broken."""
    lines = []
    for kind in [*KINDS, "all"]:
        of_kind = [report for report in reports if kind in (report.kind, "all")]
        outcomes = Counter(report.outcome for report in of_kind)
        broken = Counter(rule for r in of_kind for rule in {rule for rule, _ in r.problems})
        slowest = max((report.seconds for report in of_kind), default=0.0)
        counts = (outcomes["refused"], outcomes["accepted"])
        lines.append(
            (kind, len(of_kind), *counts, f"{slowest:.2f}", *(broken[rule] for rule in RULES))
        )
    headers = ("kind", "inputs", "refused", "accepted", "slowest call, s", *RULES)
    print(tabulate(lines, headers=headers, intfmt=","))
    examples: dict[str, list[str]] = {}
    for report in reports:
        for rule, what in report.problems:
            text = f"  input {report.index}, {report.kind} ({report.change:.150}): {what}"
            pattern = re.split(
                r"[\"'(]", re.sub("[0-9.]+", "#", what.rpartition("at softcache/")[2])
            )[0]
            examples.setdefault(f"{rule} {pattern}", []).append(text)
    for texts in sorted(examples.values(), key=len, reverse=True):
        print(f"{len(texts)} times:\n" + "\n".join(texts[:3]))
    return bool(examples)


# the worker


class Attacker:
    """Makes inputs and runs the commands on them; a context manager, in which it works in its own folder."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        show: bool = False,
        encodings: Sequence[str] = tuple(ENCODINGS),
    ) -> None:
        self.folder = folder / "input"
        self.seed, self.show = seed, show
        self.marker = folder / "executed"
        self.started = folder / "started.json"
        self._home, self._encodings = folder, encodings
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Attacker:
        made = self._home / "seeds"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        code = self._home / "code"
        code.mkdir(exist_ok=True)
        for name in ("evil.py", "fuzz_evil.py"):
            (code / name).write_text(EVIL.format(marker=str(self.marker)))
        self.marker.unlink(missing_ok=True)
        self.seeds = make_seeds(made, self._code_of, self._encodings)
        # where a specification without a folder would be found
        self._stack.enter_context(contextlib.chdir(code))
        self._stack.enter_context(mock.patch.object(sys, "path", [str(code), *sys.path]))
        self._stack.enter_context(mock.patch.object(os, "abort", self.marker.touch))
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        warnings.simplefilter(
            "always", RuntimeWarning
        )  # numpy's, which would be more lines of an error
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if not self.show:
            shutil.rmtree(self.folder, ignore_errors=True)

    def make(self, index: int) -> Input:
        """The input of this number."""
        for attempt in ("", " again", " and again"):
            draw = random.Random(f"{self.seed} {index}{attempt}")
            # two changes may put a value into itself, or a tensor beyond the end of the data
            with contextlib.suppress(ValueError, RecursionError):
                return make_input(self.seeds, draw, self.folder, self._home / "code")
        raise SystemExit(f"input {index} cannot be made; fix this benchmark")

    def attack(self, index: int, *, without: Sequence[str] = ()) -> Report:
        """Make an input, and run its commands, except those named `without`."""
        made = self.make(index)
        commands = [command for command in made.commands if command[0] not in without]
        made = dataclasses.replace(made, commands=commands)
        results = self.run_all(made)
        if max(result.seconds for result in results) > SUSPICIOUS:
            again = [self.run_all(made) for _ in range(2)]
            fastest = [min(r.seconds for r in calls) for calls in zip(results, *again, strict=True)]
            results = [
                dataclasses.replace(result, seconds=seconds)
                for result, seconds in zip(results, fastest, strict=True)
            ]
        problems = [
            (rule, f"{command[0]}: {what}")
            for command, result in zip(made.commands, results, strict=True)
            for rule, what in self.problems(made, command, result)
        ]
        refused = any(result.code for result in results)
        slowest = max(result.seconds for result in results)
        outcome = "refused" if refused else "accepted"
        return Report(index, made.kind, made.change, outcome, slowest, problems)

    def run_all(self, made: Input) -> list[Result]:
        """Write the files of an input, and run its commands in order."""
        shutil.rmtree(
            self.folder, ignore_errors=True
        )  # unlinked first, since a mapped file must not change
        for name, content in made.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        results = []
        for command in made.commands:
            self.started.write_text(json.dumps([made.kind, made.change, command[0]]))
            if self.show:
                print("softcache", " ".join(command), flush=True)
            results.append(self.call(command))
            if self.show:
                print(f"  {results[-1]}", flush=True)
        return results

    def call(self, arguments: Sequence[str]) -> Result:
        """Run one command in this process."""
        out, err = io.StringIO(), io.StringIO()
        code, crash = None, None
        reset_peak()
        before, start = peak_memory(), time.perf_counter()
        signal.alarm(HANGS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                softcache.main([*arguments], prog_name="softcache")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            crash = describe(error)
            if self.show:
                traceback.print_exc()
        finally:
            signal.alarm(0)
        seconds = time.perf_counter() - start
        return Result(code, out.getvalue(), err.getvalue(), seconds, peak_memory() - before, crash)

    def problems(self, made: Input, command: Sequence[str], result: Result) -> Iterator[Problem]:
        """The rules that a command broke."""
        if result.crash:
            yield "traceback", result.crash
        if result.seconds > SECONDS:
            yield "slow", f"{result.seconds:.1f} s"
        if result.growth > MEMORY:
            yield "memory", f"{result.growth / 1e6:,.0f} MB"
        elif NO_MEMORY.search(result.err):  # more than a worker may have
            yield "memory", ascii(result.err)[:150]
        yield from (("message", what) for what in bad_output(result))
        if self.marker.exists():
            yield "code", "code that the input names was run"
            self.marker.unlink()
            for name in [name for name in sys.modules if "evil" in name]:
                del sys.modules[name]
        accepted = result.code == 0
        page = self.folder / "page.html"
        if (
            accepted
            and command[0] == "report"
            and "<script" in page.read_text(encoding="utf-8").lower()
        ):
            yield "markup", "the page has a script"
        if accepted and made.wrong and command[0] in ("verify", "train"):
            yield "silent", f"accepted, though {made.wrong}"
        if accepted and command[0] == "train":
            yield from bad_weights(self.folder)

    def _code_of(self, arguments: Sequence[str]) -> int:
        result = self.call(arguments)
        if result.crash or result.code not in (0, 130):
            print(result, file=sys.stderr)
        return 1 if result.code is None else result.code


def describe(error: BaseException) -> str:
    """An exception in one line, with the innermost function of softcache that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/softcache/" in frame.filename] or frames
    place = f"{own[-1].filename.rpartition('/softcache/')[2]}:{own[-1].lineno} {own[-1].name}"
    return f"{type(error).__name__}: {ascii(str(error))[:150]} at softcache/{place}"


def bad_output(result: Result) -> Iterator[str]:
    """What is wrong with the output of a command, or with its error message."""
    for stream, text in (("stdout", result.out), ("stderr", result.err)):
        bad = next((line for line in text.split("\n") if not line.isprintable()), None)
        if bad is not None:
            yield f"a control character on {stream}: {ascii(bad)[:150]}"
    lines = [
        line
        for line in result.err.rstrip("\n").split("\n")
        if not line.startswith(("warning: ", "note: "))
    ]
    if not result.code or lines[0].startswith("Usage: "):
        return
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        yield f"{len(lines)} lines of error output: {ascii(result.err)[:200]}"
    elif len(lines[0]) > MESSAGE:
        yield f"an error of {len(lines[0]):,} characters: {ascii(lines[0])[:150]}"


def bad_weights(folder: Path) -> Iterator[Problem]:
    """Weights of a run that are not finite."""
    for path in sorted([*folder.glob(f"run/**/{WEIGHTS}"), *folder.glob(f"again/**/{WEIGHTS}")]):
        with contextlib.suppress(Exception):  # the file of a run that was not trained again
            if not all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values()):
                yield "silent", "accepted, and the weights are not finite"
                return


def work(folder: Path, seed: int, first: int, step: int, stop: int) -> None:
    """Attack with every `step`-th input, and print the report on each as a line of JSON."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()  # so that a signal prints a traceback
    faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)
    stdout = sys.stdout
    with Attacker(folder, seed) as attacker:
        warm_up(attacker)
        limit = private_memory() + PRIVATE_MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        for index in range(first, stop, step):
            report = dataclasses.asdict(attacker.attack(index))
            print(json.dumps(report), file=stdout, flush=True)


def warm_up(attacker: Attacker) -> None:
    """Run each command on intact files, so that everything is imported before calls are timed."""
    seed, run = attacker.seeds.caches[0], attacker.seeds.runs[0]
    out = str(attacker.folder / "warm-up")
    attacker.folder.mkdir(exist_ok=True)
    for arguments in (
        ("report", str(run.cache), str(run.path), "-o", f"{out}.html"),
        ("export", str(run.path), "--pt2"),
        ("export", str(run.path), "--onnx"),
        ("export-labels", str(seed.path), "-o", f"{out}.parquet"),
        ("compare", str(run.path), "--cache", str(run.cache), "--eval-data", run.eval_data),
        ("merge", str(seed.path), str(seed.other), "-o", f"{out}.h5"),
    ):
        result = attacker.call(arguments)
        if result.code != 0:
            raise SystemExit(f"intact files are refused: {result}")


def private_memory() -> int:
    """Bytes of private memory that this process has mapped, which RLIMIT_DATA limits."""
    with contextlib.suppress(OSError, StopIteration), Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    return 1 << 34


def self_check(attacker: Attacker) -> None:
    """Stop unless intact files are accepted and every broken rule is noticed."""
    made = Input("values", "", {}, [("verify",)], "a row is wrong")
    good = Result(0, "", "", 0.0, 0, None)
    breaks = {
        "traceback": dataclasses.replace(good, code=None, crash="IndexError"),
        "slow": dataclasses.replace(good, code=1, err="Error: x\n", seconds=SECONDS * 1.1),
        "memory": dataclasses.replace(good, code=1, err="Error: x\n", growth=MEMORY + 1),
        "message": dataclasses.replace(good, code=1, err="Error: x\ny\n"),
        "silent": good,
    }
    for rule, result in breaks.items():
        found = [broken for broken, _ in attacker.problems(made, ("verify",), result)]
        if found != [rule]:
            raise SystemExit(f"the broken rule {rule!r} is reported as {found}; fix this benchmark")
    if [*bad_output(dataclasses.replace(good, out="\x1b[31mred"))] == []:
        raise SystemExit("a character that controls a terminal is not noticed; fix this benchmark")
    seed, run = attacker.seeds.caches[0], attacker.seeds.runs[0]
    named = ("train", str(run.cache), "--student", "fuzz_evil:make")
    made = Input("config", "", {}, [(*named, "--out", str(attacker.folder / "run"))])
    (result,) = attacker.run_all(made)
    if "code" not in {rule for rule, _ in attacker.problems(made, named, result)}:
        raise SystemExit("code that is run is not noticed; fix this benchmark")
    checked = attacker.call(("verify", str(seed.path)))
    if checked.code != 0:
        raise SystemExit(f"an intact cache is refused: {checked}; fix this benchmark")
    for interrupted in attacker.seeds.checkpoints:
        files = {f"run/{name}": content for name, content in interrupted.files.items()}
        command = (*interrupted.arguments, "--out", str(attacker.folder / "run"))
        (result,) = attacker.run_all(Input("state", "", files, [command]))
        if result.code != 0:
            raise SystemExit(f"an intact checkpoint is refused: {result}; fix this benchmark")


if __name__ == "__main__":
    main()

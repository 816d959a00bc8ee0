"""Everything that needs a GPU, in one command: tests, overhead of a dump, encoding, training, memory.

Run from a checkout on a machine with a GPU; no network is needed, only torch, numpy, h5py and the small
packages of pyproject.toml (from --wheels FOLDER where the machine lacks them). The most important parts
come first, and results.json and results.md are written again after each row, so that a machine that is
taken away leaves what was measured. Without a GPU the same code runs on the CPU in a small size.

Speeds are medians of repetitions side by side, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Section = Callable[["Bench"], Iterator[Row]]

ENOUGH = 20.0  # seconds that must be left for a row to be started
CLASSES = 1000
ENCODINGS = ("dense", "quantized", "topk:32", "basis:64,8", "sampled:50", "packed:36")


@dataclass
class Bench:
    """What the sections need to know, and what they found."""

    device: str
    small: bool  # a size for a CPU
    deadline: float
    out: Path
    work: Path
    tests: str | None  # as pytest -k takes them
    rows: dict[str, list[Row]] = field(default_factory=dict)
    machine: Row = field(default_factory=dict)

    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline - ENOUGH

    def add(self, section: str, row: Row) -> None:
        """Keep a row, and write all that is known so far."""
        self.rows.setdefault(section, []).append(row)
        result = {"machine": self.machine, "sections": self.rows}
        (self.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        (self.out / "results.md").write_text(markdown(self.machine, self.rows))
        print(f"{section}: {', '.join(f'{k} {v}' for k, v in row.items())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="time for all sections")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--tests", help="run only the tests that match, as pytest -k does")
    parser.add_argument("--sections", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    options = parser.parse_args()
    if options.wheels:
        install(options.wheels)
    import torch

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU is used: the same code runs on the CPU, in a small size", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="softcache-gpu-") as work:
        bench = Bench(
            device,
            device == "cpu",
            time.monotonic() + 60 * options.minutes,
            options.out,
            Path(work),
            options.tests,
            machine=describe_machine(device),
        )
        for name in options.sections:
            run_section(bench, name)
    print(f"results: {options.out / 'results.md'}, {options.out / 'results.json'}")


def run_section(bench: Bench, name: str) -> None:
    """Rows of a section until time is up; what fails is a row too, and the next section runs."""
    if bench.out_of_time():
        bench.add(name, {"not run": "out of time"})
        return
    try:
        for row in SECTIONS[name](bench):
            bench.add(name, row)
            if bench.out_of_time():
                bench.add(name, {"not run": "the rest, for want of time"})
                return
    except Exception as error:  # one section must not cost the others
        traceback.print_exc()
        bench.add(name, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def install(wheels: Path) -> None:
    """Put the packages of a folder of wheels before all others."""
    target = tempfile.mkdtemp(prefix="softcache-wheels-")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, target, *map(str, wheels.glob("*.whl"))], check=True)
    sys.path.insert(0, target)
    os.environ["PYTHONPATH"] = os.pathsep.join([target, os.environ.get("PYTHONPATH", "")])


def describe_machine(device: str) -> Row:
    import torch

    facts: Row = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        facts["memory"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    return facts


def markdown(machine: Row, sections: dict[str, list[Row]]) -> str:
    """One table for each section."""
    lines = ["# GPU results", "", ", ".join(f"{k} {v}" for k, v in machine.items()), ""]
    for name, rows in sections.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [f"## {name}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


# measuring


def synchronize(device: str) -> None:
    """Wait until the device has done all it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one call, with all of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def side_by_side(
    runs: dict[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each, in turns, after a round that does not count."""
    from tests.bench import alternate

    return alternate(
        {name: functools.partial(seconds, work, device) for name, work in runs.items()}, repeats
    )


def spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], str]]:
    """Peak GiB of the device's memory since it was entered; "-" on the CPU, which does not count it."""
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if device == "cuda" else "-"


def teachers(bench: Bench) -> dict[str, tuple[str, int, int]]:
    """Specification, side of the images and batch size of each teacher."""
    file = Path(__file__).with_name("gpu_models.py")
    if bench.small:
        return {
            "tiny": (f"{file}:tiny", 32, 32),
            "ResNet-50 (small)": (f"{file}:small_resnet", 32, 32),
            "ViT-B/16 (small)": (f"{file}:small_vit", 32, 32),
        }
    return {
        "tiny": (f"{file}:tiny", 224, 256),
        "ResNet-50": (f"{file}:resnet50", 224, 256),
        "ViT-B/16": (f"{file}:vit_b_16", 224, 256),
    }


def images(samples: int, side: int) -> Any:  # noqa: ANN401  # an ArraySource
    """Noise with random labels."""
    import numpy as np

    from softcache.data.source import ArraySource

    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (samples, 3, side, side), dtype=np.uint8)
    return ArraySource("synthetic", inputs, random.integers(0, CLASSES, samples))


# sections


def cuda_tests(bench: Bench) -> Iterator[Row]:
    """`pytest -m gpu`: one row for each test."""
    report = bench.work / "tests.xml"
    left = max(60.0, bench.deadline - time.monotonic())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-k", bench.tests] if bench.tests else []
    command += [f"--junitxml={report}", str(Path(__file__).parents[1] / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next(
            (child for child in case if child.tag in ("failure", "error", "skipped")), None
        )
        row = {
            "test": case.get("name"),
            "result": "passed",
            "seconds": f"{float(case.get('time', 0)):.1f}",
        }
        if problem is not None:
            row |= {
                "result": problem.tag,
                "why": " ".join((problem.get("message") or "").split())[:160],
            }
        yield row
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest exited with {done.returncode}: {done.stdout[-300:]}")


def dump_overhead(bench: Bench) -> Iterator[Row]:
    """Wall time of the dump's loop against the bare forward pass, with the same loader."""
    for name, (spec, side, batch) in teachers(bench).items():
        for precision in ("fp32", "bf16"):
            yield {"teacher": name, "precision": precision} | dump_against_forward(
                bench, spec, side, batch, precision
            )
            if bench.out_of_time():
                return


def dump_against_forward(bench: Bench, spec: str, side: int, batch: int, precision: str) -> Row:
    import torch

    from softcache.cache.writer import Writer
    from softcache.data.augment import Augmentation
    from softcache.data.loader import loader, sequential_batches
    from softcache.dump.config import DumpConfig
    from softcache.dump.fidelity import measure_fidelity
    from softcache.dump.loop import fill_cache
    from softcache.dump.prepare import draft_header, load_teachers, open_unfinished
    from softcache.dump.processes import ProcessGroup
    from softcache.util.tensors import to_float

    source = images(batch * (2 if bench.small else 12), side)
    config = DumpConfig(
        teacher=spec, data="synthetic", temperature=4.0, out=bench.work / "dump.h5", classes=CLASSES,
        batch_size=batch, device=bench.device, precision=precision, overwrite=True,
    )  # fmt: skip
    plain = Augmentation(None, 0, len(source))
    ensemble = load_teachers(config, source, plain)
    teacher = ensemble.teachers[0]
    stages, cost = "", 0.0

    def forward() -> None:
        batches = sequential_batches(len(source), batch)
        with torch.inference_mode(), teacher._autocast():
            for loaded in loader(source, batches, pin_memory=bench.device == "cuda"):
                teacher.model(to_float(loaded.inputs.to(bench.device, non_blocking=True)))

    def whole_dump() -> None:
        nonlocal stages
        with Writer(config.out) as writer:
            stages = fill_cache(writer, config, source, ensemble, plain, ProcessGroup()).note()

    fills, forwards = [], []
    for repeat in range(3 if bench.small else 6):
        open_unfinished(config, draft_header(config, source, ensemble), source, ensemble, plain)
        filled, bare = seconds(whole_dump, bench.device), seconds(forward, bench.device)
        if repeat:
            fills.append(filled)
            forwards.append(bare)
        if repeat == 0:
            with Writer(config.out) as writer:
                measured = measure_fidelity(writer.cache, source, ensemble, plain, rows=64)
                cost = float(measured.get("precision", 0.0))
        (bench.work / "dump.h5.partial").unlink()
    ratios = [a / b for a, b in zip(fills, forwards, strict=True)]
    return {
        "dump / forward": spread(ratios),
        "rows/s": f"{len(source) / statistics.median(fills):,.0f}",
        "KL cost of the precision": f"{cost:.1e}",
        "stages": stages,
    }


def encode_speed(bench: Bench) -> Iterator[Row]:
    """Rows/s of each encoding on the device, and its share of a ViT-B's forward pass."""
    import numpy as np
    import torch

    from softcache.cache import parse_encoding
    from softcache.dump.fit_basis import principal_directions, shared_arrays, splits
    from softcache.models.build import build
    from softcache.targets.encode import make_encoder

    spec, side, batch = list(teachers(bench).values())[2]
    model = build(spec, input_shape=(3, side, side), classes=CLASSES).to(bench.device).eval()
    pixels = torch.rand(batch, 3, side, side, device=bench.device)
    dtype = torch.bfloat16

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(torch.device(bench.device).type, dtype):
            model(pixels)

    for classes in (1000,) if bench.small else (1000, 32_000, 128_000):
        generator = torch.Generator(bench.device).manual_seed(0)
        hidden = torch.randn(batch, 64, generator=generator, device=bench.device)
        head = torch.randn(64, classes, generator=generator, device=bench.device)
        log_probs = torch.log_softmax(hidden @ head / 4, -1)
        for name in ENCODINGS:
            shared: dict[str, Any] = {}
            if name.startswith("basis"):
                fitted = principal_directions(log_probs, max_directions=128)
                encoding: Any = next(iter(splits(64, 8, len(fitted.directions))))
                shared = shared_arrays(encoding, fitted)
            else:
                encoding = parse_encoding(name, 4.0)
            encode = make_encoder(
                encoding, shared, temperature=4.0, seed=0, device=torch.device(bench.device)
            )
            encode_batch = functools.partial(encode, log_probs, 0, np.arange(batch))
            measured = side_by_side(
                {"encode": encode_batch, "forward": forward},
                bench.device,
                2 if bench.small else 10,
            )
            shares = [a / b for a, b in zip(measured["encode"], measured["forward"], strict=True)]
            yield {
                "classes": f"{classes:,}",
                "encoding": name,
                "rows/s": f"{batch / statistics.median(measured['encode']):,.0f}",
                "encode / ViT-B forward (bf16)": spread(shares),
            }
            if bench.out_of_time():
                return


def training_speed(bench: Bench) -> Iterator[Row]:
    """Training from the cache against targets in the device's memory, and against the live teacher."""

    from tests.bench import random_log_probs, synthetic_images, write_cache

    samples = 256 if bench.small else 20_000
    source = synthetic_images(samples, CLASSES)
    soft = random_log_probs(samples, CLASSES, 4.0, seed=1)
    cache = write_cache(
        bench.work / "targets.h5", lambda part: soft[part.start : part.stop], samples, CLASSES, 4.0
    )
    for student in ("mlp:64",) if bench.small else ("mlp:1024,1024", "resnet:20,32"):
        run = TrainingRun(bench, source, cache, student)
        in_memory = soft.to(bench.device)
        live = live_teacher(bench)
        kinds: dict[str, Callable[[], object]] = {
            "cache": run.from_cache,
            "memory": functools.partial(run.from_tensor, in_memory),
            "live": functools.partial(run.from_teacher, live),
        }
        measured = side_by_side(kinds, bench.device, 1 if bench.small else 4)
        yield {
            "student": student,
            "steps/s from the cache": f"{run.steps / statistics.median(measured['cache']):,.0f}",
            "memory / cache": spread(
                [a / b for a, b in zip(measured["memory"], measured["cache"], strict=True)]
            ),
            "live / cache": spread(
                [a / b for a, b in zip(measured["live"], measured["cache"], strict=True)]
            ),
        }


def live_teacher(bench: Bench) -> Any:  # noqa: ANN401  # a module
    """The teacher that is asked in every step: a residual network at the size of the samples."""
    from softcache.models.build import build

    spec = "resnet:8,8" if bench.small else "resnet:56,64"
    return build(spec, input_shape=(3, 32, 32), classes=CLASSES).to(bench.device).eval()


@dataclass
class TrainingRun:
    """One epoch of a student, whose targets come from somewhere."""

    bench: Bench
    source: Any
    cache: Any
    student: str
    batch_size: int = 128

    @property
    def steps(self) -> int:
        return len(self.source) // self.batch_size

    def from_cache(self) -> None:
        import torch

        from softcache.targets.fetch import soft_targets

        self._fit(soft_targets(self.cache, 4.0, torch.device(self.bench.device)))

    def from_tensor(self, soft: Any) -> None:  # noqa: ANN401  # (N, C) on the device
        import torch

        def fetch(views: object, rows: Any) -> Any:  # noqa: ANN401
            return torch.index_select(soft, 0, torch.from_numpy(rows).to(soft.device))

        self._fit(fetch)

    def from_teacher(self, teacher: Any) -> None:  # noqa: ANN401  # a module
        import torch

        def fetch(views: object, rows: Any) -> Any:  # noqa: ANN401
            pixels = torch.from_numpy(self.source.inputs[rows]).to(self.bench.device).float() / 255
            with torch.inference_mode():
                log_probs = torch.log_softmax(teacher(pixels) / 4.0, -1)
            return log_probs.clone()

        self._fit(fetch)

    def _fit(self, targets: Callable[[Any, Any], Any]) -> None:
        import numpy as np

        from softcache.join.fingerprints import replayed
        from softcache.join.joined_data import JoinedData
        from softcache.train.accelerator import make_accelerator
        from softcache.train.loop import fit
        from softcache.train.options import make_train_config

        config = make_train_config(
            student=self.student, data="synthetic", cache=self.cache.path, out=self.bench.work / "run",
            epochs=1, batch_size=self.batch_size, device=self.bench.device, temperature=4.0, alpha=1.0,
        )  # fmt: skip
        every = np.arange(len(self.source))
        part = JoinedData(
            self.source, every, every, every, replayed(self.cache.header, None), CLASSES, self.cache,
            lambda views, rows: {4.0: targets(views, rows)},
        )  # fmt: skip
        fit(config, make_accelerator(self.bench.device, "fp32"), [part], None)


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of the device: the bare forward pass, a dump, a training."""
    import torch

    from softcache.data.augment import Augmentation
    from softcache.dump.config import DumpConfig
    from softcache.dump.prepare import load_teachers
    from tests.bench import random_log_probs, synthetic_images, write_cache

    for name, (spec, side, batch) in teachers(bench).items():
        source = images(batch, side)
        config = DumpConfig(
            teacher=spec, data="synthetic", temperature=4.0, out=bench.work / "memory.h5",
            classes=CLASSES, batch_size=batch, device=bench.device,
        )  # fmt: skip
        ensemble = load_teachers(config, source, Augmentation(None, 0, len(source)))
        pixels = torch.from_numpy(source.inputs).to(bench.device).float() / 255
        with peak_memory(bench.device) as peak, torch.inference_mode():
            ensemble.teachers[0].model(pixels)
            bare = peak()
        with peak_memory(bench.device) as peak:
            ensemble.log_probs(pixels, 4.0)
            dumped = peak()
        yield {"what": f"dump, {name}", "forward, GiB": bare, "GiB": dumped}
    samples = 256 if bench.small else 20_000
    soft = random_log_probs(samples, CLASSES, 4.0, seed=1)
    path = bench.work / "memory-targets.h5"
    cache = write_cache(path, lambda part: soft[part.start : part.stop], samples, CLASSES, 4.0)
    run = TrainingRun(bench, synthetic_images(samples, CLASSES), cache, "resnet:8,8")
    with peak_memory(bench.device) as peak:
        run.from_cache()
        yield {"what": "train, resnet:8,8", "forward, GiB": "", "GiB": peak()}


SECTIONS: dict[str, Section] = {
    "tests": cuda_tests,
    "dump": dump_overhead,
    "encode": encode_speed,
    "train": training_speed,
    "memory": memory,
}

if __name__ == "__main__":
    main()

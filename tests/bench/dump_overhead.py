"""The time that writing a cache adds to running the teacher: dump against a loop that stores nothing.

Both loops use the same loader, augmentation, batches and checked teacher. The loop that stores nothing
hashes no samples, computes no softmax and does not touch the disk. "fill" is the loop of the dump with the
last commit; "before + after" is the time of the rest of a dump: allocation, summary, running the teacher
again for the fidelity, and renaming. "stages" is where the thread of the dump's loop spent its time:
waiting for data, running the teacher (and encoding), waiting for the disk. --threads 1 leaves the other
cores to the stages around the teacher, as a GPU does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate

from softcache.cache.summary import summarize
from softcache.cache.writer import Writer
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.loader import augmented, loader, sequential_batches
from softcache.data.source import ArraySource
from softcache.dump import fidelity
from softcache.dump.config import DumpConfig
from softcache.dump.loop import fill_cache
from softcache.dump.prepare import draft_header, load_teachers, open_unfinished
from softcache.dump.processes import ProcessGroup
from softcache.models.build import build
from softcache.teachers.ensemble import Ensemble
from tests.bench import (
    alternate,
    first,
    machine,
    open_arrays,
    ratios,
    spread,
    synthetic_images,
    work_folder,
)

GOAL = 1.05
PROBE = 2000  # samples with which to estimate how many fit into --seconds
SYNTHETIC = (50_000, 1000)  # samples, classes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--teachers", nargs="+", default=["cnn:16,32,64", "resnet:20,16", "resnet:56,32"]
    )
    parser.add_argument("--mnist", default="idx:data/mnist", help="data specification")
    parser.add_argument("--seconds", type=float, default=10, help="approximate time of one loop")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--augment", help="as in softcache dump")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads [default: one per core]")
    parser.add_argument("--folder", type=Path, help="folder for caches [default: a temporary one]")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [(open_arrays(options.mnist), 10), (synthetic_images(*SYNTHETIC), SYNTHETIC[1])]
    lines = []
    with work_folder(options.folder) as folder:
        for source, classes in cases:
            for spec in options.teachers:
                config = DumpConfig(
                    teacher=spec,
                    weights=folder / "teacher.safetensors",
                    data=source.name,
                    temperature=4.0,
                    out=folder / "overhead.h5",
                    classes=classes,
                    batch_size=options.batch_size,
                    augment=options.augment,
                    device=options.device,
                    workers=options.workers,
                    overwrite=True,
                )
                make_weights(spec, source, classes, folder / "teacher.safetensors")
                teacher = load_teachers(config, source, augmentation_of(config, source))
                samples = fitting(config, source, teacher, options.seconds)
                lines.append(measure(config, samples, teacher, options.repeats))
                print(f"{source.name}, {spec}: done", flush=True)
    headers = (
        "data", "classes", "teacher", "rows", "nothing, s", "fill / nothing", "min", "max",
        f"<= {GOAL}", "before + after, s", "stages",
    )  # fmt: skip
    print(f"\nRatio of wall times, median of {options.repeats} pairs, side by side; {machine()}")
    print(tabulate(lines, headers=headers, disable_numparse=True))


def make_weights(spec: str, source: ArraySource, classes: int, path: Path) -> None:
    """Save the weights of an untrained teacher, which is as fast as a trained one."""
    torch.manual_seed(0)
    model = build(spec, input_shape=source.inputs.shape[1:], classes=classes)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def augmentation_of(config: DumpConfig, source: ArraySource) -> Augmentation:
    return parse_augment(config.augment, seed=config.seed, total=len(source))


def fitting(
    config: DumpConfig, source: ArraySource, teacher: Ensemble, seconds: float
) -> ArraySource:
    """As many samples as the loop that stores nothing processes in about `seconds`."""
    probe = first(source, PROBE)
    keep_nothing(config, probe, teacher)
    rate = len(probe) / keep_nothing(config, probe, teacher)
    batches = max(1, round(rate * seconds / config.batch_size))
    return first(source, batches * config.batch_size)


def measure(config: DumpConfig, source: ArraySource, teacher: Ensemble, repeats: int) -> list[str]:
    """One line of the table."""
    rest, notes = [], []

    def kept() -> float:
        fill_seconds, other_seconds, note = keep(config, source, teacher)
        rest.append(other_seconds)
        notes.append(note)
        return fill_seconds

    seconds = alternate(
        {"nothing": lambda: keep_nothing(config, source, teacher), "kept": kept}, repeats
    )
    overhead = ratios(seconds["kept"], seconds["nothing"])
    assert isinstance(config.teacher, str)  # main() gives a single teacher
    return [
        source.name,
        f"{teacher.classes:,}",
        config.teacher,
        f"{len(source):,}",
        f"{statistics.median(seconds['nothing']):.2f}",
        *spread(overhead),
        "yes" if statistics.median(overhead) <= GOAL else "no",
        f"{statistics.median(rest):.2f}",
        notes[-1],
    ]


def keep(config: DumpConfig, source: ArraySource, teacher: Ensemble) -> tuple[float, float, str]:
    """Seconds of the dump's loop with the last commit, seconds of the rest, and a note on the stages."""
    start = time.perf_counter()
    augmentation = augmentation_of(config, source)
    open_unfinished(config, draft_header(config, source, teacher), source, teacher, augmentation)
    with Writer(config.out) as writer:
        loop_start = time.perf_counter()
        watch = fill_cache(writer, config, source, teacher, augmentation, ProcessGroup())
        writer.commit()
        loop_end = time.perf_counter()
        summary = summarize(writer.cache)
        summary["fidelity"] = fidelity.measure_fidelity(writer.cache, source, teacher, augmentation)
        writer.finish(summary)
    end = time.perf_counter()
    config.out.unlink()
    return loop_end - loop_start, end - loop_end + loop_start - start, watch.note()


def keep_nothing(config: DumpConfig, source: ArraySource, teacher: Ensemble) -> float:
    """Seconds of the same loop without encoding and writing."""
    start = time.perf_counter()
    augmentation = augmentation_of(config, source)
    batches = sequential_batches(len(source), config.batch_size)
    for batch in loader(source, batches, workers=config.workers):
        samples = batch.source_indices.numpy()
        inputs = augmented(batch, augmentation, 0, samples, teacher.device)
        for member in teacher.teachers:
            member.logits(inputs, samples)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

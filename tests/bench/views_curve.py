"""How many cached views does it take to replace the live teacher?

One student and one augmentation: with 1, 2, 4, … cached views, with the live teacher on fresh views
in every epoch, and with the inconsistent cache, whose labels belong to the images as they are while
the student sees them augmented (under mixup, the labels are mixed as the images are). Shown are test
errors and KL(teacher ‖ student) on test images, mean and standard error over the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate

from softcache.cache import Cache, open_cache
from softcache.data import open_source, to_float
from softcache.dump import DumpConfig, dump, load_teachers
from softcache.join import JoinedData, TrainingBatch, join, labels_alone
from softcache.learner import Learner, make_accelerator
from softcache.loader import Batch, loader, sequential_batches
from softcache.loss import soft_loss
from softcache.targets import soft_targets
from softcache.teacher import Ensemble
from softcache.train import TrainConfig, fit
from softcache.views import Augmentation, uniform
from tests.bench import first_samples, machine, work_folder

ROTATION_STREAM = 1 << 40


@dataclass(frozen=True)
class LiveData(JoinedData):
    """Every epoch is a view of its own, and the teacher is asked about it."""

    teacher: Ensemble | None = None
    temperature: float = 1.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        found = super().training_batch(batch, epoch, device)
        assert self.teacher is not None
        with torch.inference_mode():
            said = self.teacher.log_probs(found.inputs, self.temperature)
        return found._replace(targets=said.clone())


@dataclass(frozen=True)
class InconsistentData(JoinedData):
    """Every epoch is a view of its own, with the teacher's word on the images as they are."""

    plain: Cache | None = None
    temperature: float = 1.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        found = super().training_batch(batch, epoch, device)
        assert self.plain is not None
        targets = soft_targets(self.plain, self.temperature, device)
        samples, view = batch.samples.numpy(), self.view(epoch)
        said = targets(0, samples)
        partners = self.augmentation.partners(view, samples)
        assert isinstance(said, torch.Tensor)
        if partners is not None:
            theirs = targets(0, partners)
            assert isinstance(theirs, torch.Tensor)
            share = torch.from_numpy(self.augmentation.shares(view, samples)).float()[:, None]
            said = (said.exp() * (1 - share) + theirs.exp() * share).log()
        return found._replace(targets=said)


@dataclass(frozen=True)
class RotatedAugmentation(Augmentation):
    """Each sample begins its turn through the views at a view of its own."""

    views: int = 1

    def turned(self, epoch: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        first = uniform(self.seed, 0, samples, stream=ROTATION_STREAM, draws=1)
        return (epoch + (first * self.views).astype(np.int64)) % self.views  # (B, 1)


@dataclass(frozen=True)
class RotatedData(JoinedData):
    """The cached views, each sample in an order that begins elsewhere; dense caches only."""

    temperature: float = 1.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        assert self.cache is not None
        samples, header = batch.samples.numpy(), self.cache.header
        first = uniform(header.seed, 0, samples, stream=ROTATION_STREAM, draws=1)[:, 0]
        views = (epoch + (first * header.views).astype(np.int64)) % header.views
        own = self.augmentation
        raw = to_float(batch.inputs)
        theirs = None
        if own.mixup:
            partners = np.stack(
                [own.partners(int(v), samples[i : i + 1]) for i, v in enumerate(views)]  # type: ignore[misc]
            )[:, 0]
            theirs = to_float(self.source.fetch(partners.tolist())[0])
        inputs = torch.cat(
            [
                own(raw[i : i + 1], None if theirs is None else theirs[i : i + 1], int(v), samples[i : i + 1])
                for i, v in enumerate(views)
            ]
        )
        stored = torch.from_numpy(self.cache.arrays["log_probs"][views, samples]).float()
        soft = torch.log_softmax(stored * (header.temperature / self.temperature), -1)
        return TrainingBatch(inputs, batch.labels, soft)


@dataclass(frozen=True)
class Job:
    """One student."""

    way: str
    views: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a student came to on the test images."""

    way: str
    seed: int
    errors: int
    kl: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True, help="idx:DIR or npz:FILE, with a test split")
    parser.add_argument("--samples", type=int, help="the first of them [default: all]")
    parser.add_argument("--student", default="cnn:16,32,64")
    parser.add_argument("--augment", default="crop:0.3,flip,mixup")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rotated", type=int, nargs="*", default=[], help="views, also rotated")
    parser.add_argument("--epochs", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="students at once, a thread each")
    parser.add_argument("--plot", type=Path, help="a PNG (needs matplotlib)")
    parser.add_argument(
        "--folder", type=Path, help="where caches and results go; kept, a rerun goes on from them"
    )
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        options.train = first_samples(options.data, options.samples, folder)
        dump(dump_config(options, folder, "views.h5", max(options.views), options.augment))
        dump(dump_config(options, folder, "plain.h5", 1, None))
        ways = [
            *((f"cache, {v} view{'s' * (v > 1)}", v) for v in options.views),
            *((f"rotated, {v} views", v) for v in options.rotated),
            ("live teacher", 0),
            ("inconsistent", 0),
        ]
        jobs = [Job(way, views, seed) for seed in options.seeds for way, views in ways]
        outcomes = list(run_all(jobs, options, folder))
        report(outcomes, [way for way, _ in ways], options, folder)


def dump_config(
    options: argparse.Namespace, folder: Path, name: str, views: int, augment: str | None
) -> DumpConfig:
    return DumpConfig(
        teacher=options.teacher,
        weights=options.weights,
        data=options.train,
        temperature=options.temperature,
        views=views,
        augment=augment,
        out=folder / name,
        device="cpu",
    )


def run_all(
    jobs: Sequence[Job], options: argparse.Namespace, folder: Path
) -> Iterator[Outcome]:
    """Train every student that is not in results.jsonl yet."""
    results = folder / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["way"], line["seed"]): Outcome(**line) for line in known}
    yield from (done[job.way, job.seed] for job in jobs if (job.way, job.seed) in done)
    left = [job for job in jobs if (job.way, job.seed) not in done]
    with ProcessPoolExecutor(options.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for outcome in pool.map(run, left, [options] * len(left), [folder] * len(left)):
            with results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"{outcome.way}, seed {outcome.seed}: {outcome.errors} errors, KL {outcome.kl:.4f}", flush=True)
            yield outcome


def run(job: Job, options: argparse.Namespace, folder: Path) -> Outcome:
    """Train one student."""
    source, test = open_source(options.train), open_source(f"{options.data}@test")
    accelerator = make_accelerator("cpu", "no")
    cache = open_cache(folder / "views.h5")
    teacher = load_teachers(
        dump_config(options, folder, "views.h5", 1, options.augment),
        source,
        Augmentation(None, 0),
    )
    temperature = options.temperature
    config = TrainConfig(
        student=options.student,
        data=options.train,
        cache=cache.path,
        out=folder / f"{job.way.replace(', ', '-').replace(' ', '-')}-{job.seed}",
        epochs=options.epochs,
        learning_rate=options.lr,
        alpha=1.0,
        seed=job.seed,
        device="cpu",
    )
    part: JoinedData
    if job.views:
        part = join(
            source,
            replace(cache, header=replace(cache.header, views=job.views)),
            augment=None,
            temperature=temperature,
            device=accelerator.device,
        )
        if job.way.startswith("rotated"):
            part = RotatedData(**vars(part), temperature=temperature)
    else:
        alone = labels_alone(source, options.augment, 1000 + job.seed, cache.header.classes)
        part = (
            LiveData(**vars(alone), teacher=teacher, temperature=temperature)
            if job.way == "live teacher"
            else InconsistentData(
                **vars(alone), plain=open_cache(folder / "plain.h5"), temperature=temperature
            )
        )
    learner = fit(config, accelerator, [part], temperature, None)[0]
    errors, kl = held_out(learner, teacher, test, temperature)
    return Outcome(job.way, job.seed, errors, kl)


def held_out(
    learner: Learner, teacher: Ensemble, test: object, temperature: float
) -> tuple[int, float]:
    """Errors, and KL(teacher ‖ student) at the temperature, on test images as they are."""
    learner.model.eval()
    errors, kl, total = 0, 0.0, 0
    with torch.inference_mode():
        for batch in loader(test, sequential_batches(len(test), 500)):  # type: ignore[arg-type]
            inputs = to_float(batch.inputs)
            logits = learner.model(inputs)
            errors += int((logits.argmax(-1) != batch.labels).sum())
            said = teacher.log_probs(inputs, temperature)
            kl += float(soft_loss(logits, said, temperature)) * len(inputs)
            total += len(inputs)
    return errors, kl / total


def report(
    outcomes: Sequence[Outcome], ways: Sequence[str], options: argparse.Namespace, folder: Path
) -> None:
    """The table, the number of views that are enough, and the plot."""
    header = open_cache(folder / "views.h5").header
    found = {}
    for way in ways:
        errors = np.array([o.errors for o in outcomes if o.way == way], np.float64)
        kl = np.array([o.kl for o in outcomes if o.way == way])
        root = max(1, len(errors)) ** 0.5
        found[way] = (
            errors.mean(), errors.std(ddof=1) / root, kl.mean(), kl.std(ddof=1) / root
        )  # fmt: skip
    rows = [
        [way, f"{e:.0f}", f"{es:.0f}", f"{k:.4f}", f"{ks:.4f}"]
        for way, (e, es, k, ks) in found.items()
    ]
    print(
        f"\n{header.samples:,} samples of {options.data}, student {options.student}, "
        f"{options.epochs} epochs, augment {options.augment}, T = {options.temperature:g}, "
        f"{len(options.seeds)} seeds; {machine()}\n"
    )
    print(tabulate(rows, headers=["labels", "test errors", "± s.e.", "KL", "± s.e."], disable_numparse=True))
    live, error = found["live teacher"][:2]
    enough = [v for v in options.views if found[f"cache, {v} view{'s' * (v > 1)}"][0] <= live + error]
    if enough:
        views = min(enough)
        size = views * header.samples * header.bytes_per_row
        print(
            f"\nFrom {views} views on the cache is within one standard error of the live teacher (or "
            f"better): {size:,} bytes of rows; dumping them costs {views} passes of the teacher, a live "
            f"teacher {options.epochs} for each student."
        )
    else:
        print("\nNo number of views comes within one standard error of the live teacher.")
    if options.plot:
        draw(found, options)


def draw(found: dict[str, tuple[float, float, float, float]], options: argparse.Namespace) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for panel, at, what in zip(panels, (0, 2), ("test errors", "KL(teacher ‖ student)"), strict=True):
        names = [f"cache, {v} view{'s' * (v > 1)}" for v in options.views]
        panel.errorbar(
            options.views,
            [found[name][at] for name in names],
            [found[name][at + 1] for name in names],
            marker="o",
            label="cached views",
        )
        for way, colour in (("live teacher", "tab:green"), ("inconsistent", "tab:red")):
            mean, error = found[way][at : at + 2]
            panel.axhline(mean, color=colour, label=way)
            panel.axhspan(mean - error, mean + error, color=colour, alpha=0.2)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("cached views")
        panel.set_ylabel(what)
        panel.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()

"""How many cached views does it take to replace the live teacher?

One student and one augmentation: with 1, 2, 4, … cached views, with the live teacher on fresh views
in every epoch, and with the inconsistent cache, whose labels belong to the images as they are while
the student sees them augmented (under mixup, the labels are mixed as the images are). Shown are test
errors and KL(teacher ‖ student) on test images, mean and standard error over the seeds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from softcache.cache import Cache, open_cache
from softcache.data.augment import Augmentation
from softcache.data.loader import Batch, loader, sequential_batches
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.prepare import load_teachers
from softcache.join.joined_data import JoinedData, TrainingBatch, hard_label_data
from softcache.join.match import join
from softcache.losses import soft_loss
from softcache.targets.fetch import soft_targets
from softcache.teachers.ensemble import Ensemble
from softcache.train.config import make_train_config
from softcache.train.loop import fit
from softcache.train.prepare import make_accelerator
from softcache.train.student import Student
from softcache.util.tensors import to_float
from tests.bench import first_samples, machine, work_folder
from tests.bench.frontier import pyplot
from tests.bench.pool import Outcome, mean_and_error, run_jobs
from tests.configs import replace

FORMS = {"errors": ".0f", "kl": ".4f"}
Found = dict[str, dict[str, tuple[float, float]]]  # way, what, its mean and standard error


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
        return found._replace(targets={self.temperature: said.clone()})


@dataclass(frozen=True)
class InconsistentData(JoinedData):
    """Every epoch is a view of its own, with the teacher's word on the images as they are."""

    plain: Cache | None = None
    temperature: float = 1.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        found = super().training_batch(batch, epoch, device)
        assert self.plain is not None
        targets = soft_targets(self.plain, self.temperature, device)
        samples = batch.sample_ids.numpy()
        view = self.views(epoch, samples)
        said = targets(0, samples)
        partners = self.augmentation.partners(view, samples)
        assert isinstance(said, torch.Tensor)
        if partners is not None:
            theirs = targets(0, partners)
            assert isinstance(theirs, torch.Tensor)
            share = torch.from_numpy(self.augmentation.partner_weights(view, samples)).float()[
                :, None
            ]
            said = (said.exp() * (1 - share) + theirs.exp() * share).log()
        return found._replace(targets={self.temperature: said})


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
    parser.add_argument(
        "--in-step",
        type=int,
        nargs="*",
        default=[4],
        help="views, also with all samples in one view",
    )
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
            *((cached(v), v) for v in options.views),
            *((f"in step, {v} views", v) for v in options.in_step),
            ("live teacher", 0),
            ("inconsistent", 0),
        ]
        jobs = {
            f"{way}, seed {seed}": (way, views, seed, options, folder)
            for seed in options.seeds
            for way, views in ways
        }
        outcomes = run_jobs(student, jobs, folder, options.jobs)
        found = {
            way: {
                key: mean_and_error(
                    [outcomes[f"{way}, seed {seed}"][key] for seed in options.seeds]
                )
                for key in ("errors", "kl")
            }
            for way, _ in ways
        }
        report(found, options, folder)


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


def student(way: str, views: int, seed: int, options: argparse.Namespace, folder: Path) -> Outcome:
    """Train one student; its errors, and KL(teacher ‖ student) at the temperature, on test images."""
    source, test = open_source(options.train), open_source(f"{options.data}@test")
    accelerator = make_accelerator("cpu", "fp32")
    cache = open_cache(folder / "views.h5")
    teacher = load_teachers(
        dump_config(options, folder, "views.h5", 1, options.augment),
        source,
        Augmentation(None, 0),
    )
    temperature = options.temperature
    config = make_train_config(
        student=options.student,
        data=options.train,
        cache=cache.path,
        out=folder / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}",
        epochs=options.epochs,
        learning_rate=options.lr,
        alpha=1.0,
        temperature=temperature,
        seed=seed,
        device="cpu",
    )
    part: JoinedData
    if views:
        part = join(
            source,
            replace(cache, header=replace(cache.header, views=views)),
            augment=None,
            temperatures=[temperature],
            device=accelerator.device,
            rotate=not way.startswith("in step"),
        )
    else:
        alone = hard_label_data(source, options.augment, 1000 + seed, cache.header.classes)
        part = (
            LiveData(**vars(alone), teacher=teacher, temperature=temperature)
            if way == "live teacher"
            else InconsistentData(
                **vars(alone), plain=open_cache(folder / "plain.h5"), temperature=temperature
            )
        )
    learner = fit(config, accelerator, [part], None)[0]
    return held_out(learner, teacher, test, temperature)


def held_out(learner: Student, teacher: Ensemble, test: Source, temperature: float) -> Outcome:
    """On test images as they are."""
    learner.model.eval()
    errors, kl = 0, 0.0
    with torch.inference_mode():
        for batch in loader(test, sequential_batches(len(test), 500)):
            inputs = to_float(batch.inputs)
            logits = learner.model(inputs)
            errors += int((logits.argmax(-1) != batch.labels).sum())
            said = teacher.log_probs(inputs, temperature)
            kl += float(soft_loss(logits, said, temperature)) * len(inputs)
    return {"errors": errors, "kl": kl / len(test)}


def report(found: Found, options: argparse.Namespace, folder: Path) -> None:
    """The table, the number of views that are enough, and the plot."""
    header = open_cache(folder / "views.h5").header
    rows = [
        [way, *(f"{value:{form}}" for key, form in FORMS.items() for value in found[way][key])]
        for way in found
    ]
    print(
        f"\n{header.samples:,} samples of {options.data}, student {options.student}, "
        f"{options.epochs} epochs, augment {options.augment}, T = {options.temperature:g}, "
        f"{len(options.seeds)} seeds; {machine()}\n"
    )
    headings = ["labels", "test errors", "± s.e.", "KL", "± s.e."]
    print(tabulate(rows, headers=headings, disable_numparse=True))
    live, error = found["live teacher"]["errors"]
    enough = [v for v in options.views if found[cached(v)]["errors"][0] <= live + error]
    if enough:
        views = min(enough)
        size = views * header.samples * header.bytes_per_row
        print(
            f"\nFrom {views} views on, the cache is within one standard error of the live teacher, or "
            f"better: {size:,} bytes of rows. Dumping them takes {views} passes of the teacher, once; "
            f"a live teacher takes {options.epochs} for each student."
        )
    else:
        print("\nNo number of views comes within one standard error of the live teacher.")
    if options.plot:
        draw(found, options)


def cached(views: int) -> str:
    return f"cache, {views} view{'s' * (views > 1)}"


def draw(found: Found, options: argparse.Namespace) -> None:
    plt = pyplot()
    plt.switch_backend("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    labels = {"errors": "test errors", "kl": "KL(teacher ‖ student) on test images"}
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        means, errors = zip(*(found[cached(views)][key] for views in options.views), strict=True)
        panel.errorbar(options.views, means, errors, marker="o", label="cached views")
        for way, colour in (("live teacher", "tab:green"), ("inconsistent", "tab:red")):
            mean, error = found[way][key]
            panel.axhline(mean, color=colour, label=way)
            panel.axhspan(mean - error, mean + error, color=colour, alpha=0.2)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("cached views")
        panel.set_ylabel(label)
        panel.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()

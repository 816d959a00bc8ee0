"""How many cached views does it take to replace the live teacher?

One student and one augmentation are trained with 1, 2, 4, … cached views, with the live teacher on new
views in every epoch, and with an inconsistent cache, whose soft targets belong to the original images while
the student sees augmented ones (with mixup, soft targets are mixed like the images). --tricks tries what may
do for more views: `flip` mirrors half of the cached views and `shift` moves them by a pixel, while their
soft targets stay; `mixup` mixes cached
views of a batch, with their soft targets; `ema` averages the weights. Reported are test
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
from softcache.targets.decode import to_dense
from softcache.targets.fetch import soft_targets
from softcache.teachers.ensemble import Ensemble
from softcache.train.accelerator import make_accelerator
from softcache.train.loop import fit
from softcache.train.options import make_train_config
from softcache.train.student import Student
from softcache.util.tensors import to_float
from tests.bench import first_samples, machine, work_folder
from tests.bench.frontier import pyplot
from tests.bench.live_teacher import LiveData
from tests.bench.pool import Outcome, mean_and_error, run_jobs
from tests.configs import replace

FORMS = {"errors": ".0f", "kl": ".4f"}
Results = dict[str, dict[str, tuple[float, float]]]  # variant -> metric -> mean and standard error


@dataclass(frozen=True)
class InconsistentData(JoinedData):
    """Every epoch is a view of its own, but the soft targets belong to the original images."""

    plain: Cache | None = None
    temperature: float = 1.0

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        training_batch = super().training_batch(batch, epoch, device)
        assert self.plain is not None
        targets = soft_targets(self.plain, self.temperature, device)
        sample_ids = batch.sample_ids.numpy()
        view = self.views(epoch, sample_ids)
        log_probs = targets(0, sample_ids)
        partners = self.augmentation.partners(view, sample_ids)
        assert isinstance(log_probs, torch.Tensor)
        if partners is not None:
            partner_log_probs = targets(0, partners)
            assert isinstance(partner_log_probs, torch.Tensor)
            weights = torch.from_numpy(self.augmentation.partner_weights(view, sample_ids))
            weights = weights.float()[:, None]  # (B, 1)
            mixed = log_probs.exp() * (1 - weights) + partner_log_probs.exp() * weights
            log_probs = mixed.log()
        return training_batch._replace(targets={self.temperature: log_probs})


@dataclass(frozen=True)
class MixedData(JoinedData):
    """Cached views mixed with others of the same batch, like their soft targets: uniform mixup."""

    def training_batch(self, batch: Batch, epoch: int, device: torch.device) -> TrainingBatch:
        training_batch = super().training_batch(batch, epoch, device)
        inputs, count = training_batch.inputs, len(training_batch.inputs)
        generator = torch.Generator().manual_seed(int(batch.sample_ids[0]) * 10_000 + epoch)
        partners = torch.randperm(count, generator=generator)
        weights = torch.rand(count, generator=generator)  # (B,)
        mixed = inputs.lerp(inputs[partners], weights.view(-1, *[1] * (inputs.ndim - 1)))
        targets = {
            temperature: to_dense(log_probs).exp().lerp(
                to_dense(log_probs).exp()[partners], weights[:, None]
            ).log()
            for temperature, log_probs in training_batch.targets.items()
        }  # fmt: skip
        return training_batch._replace(inputs=mixed, targets=targets)


TRICKS = {
    "flip": "flip",
    "shift": "shift:1",
    "mixup": None,
    "ema": None,
}  # with an extra augmentation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True, help="idx:DIR or npz:FILE, with a test split")
    parser.add_argument("--samples", type=int, help="train on the first samples [default: all]")
    parser.add_argument("--student", default="cnn:16,32,64")
    parser.add_argument("--augment", default="crop:0.3,flip,mixup")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--in-step",
        type=int,
        nargs="*",
        default=[4],
        help="numbers of views for which all samples also share one view in each epoch",
    )
    parser.add_argument(
        "--tricks",
        nargs="*",
        default=[],
        help=f"joined by +: {', '.join(TRICKS)}, such as flip+ema",
    )
    parser.add_argument("--trick-views", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=64)
    parser.add_argument("--inconsistent", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="parallel students, one thread each")
    parser.add_argument("--plot", type=Path, help="a PNG (needs matplotlib)")
    parser.add_argument(
        "--folder", type=Path, help="folder for caches and results; a rerun continues from it"
    )
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        options.train = first_samples(options.data, options.samples, folder)
        dump(dump_config(options, folder, "views.h5", max(options.views), options.augment))
        dump(dump_config(options, folder, "plain.h5", 1, None))
        variants = [
            *((cached(v), v) for v in options.views),
            *((f"in step, {v} views", v) for v in options.in_step),
            *(
                (f"{trick}, {options.trick_views} views", options.trick_views)
                for trick in options.tricks
            ),
            ("live teacher", 0),
            *([("inconsistent", 0)] if options.inconsistent else []),
        ]
        jobs = {
            f"{variant}, seed {seed}": (variant, views, seed, options, folder)
            for seed in options.seeds
            for variant, views in variants
        }
        outcomes = run_jobs(student, jobs, folder, options.jobs)
        results = {
            variant: {
                metric: mean_and_error(
                    [outcomes[f"{variant}, seed {seed}"][metric] for seed in options.seeds]
                )
                for metric in ("errors", "kl")
            }
            for variant, _ in variants
        }
        report(results, options, folder)


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


def student(
    variant: str, views: int, seed: int, options: argparse.Namespace, folder: Path
) -> Outcome:
    """Train one student; returns its errors and KL(teacher ‖ student) on test images."""
    source, test = open_source(options.train), open_source(f"{options.data}@test")
    accelerator = make_accelerator("cpu", "fp32")
    cache = open_cache(folder / "views.h5")
    teacher = load_teachers(
        dump_config(options, folder, "views.h5", 1, options.augment),
        source,
        Augmentation(None, 0),
    )
    temperature = options.temperature
    tricks = variant.partition(",")[0].split("+")
    config = make_train_config(
        student=options.student,
        data=options.train,
        cache=cache.path,
        out=folder / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}",
        epochs=options.epochs,
        learning_rate=options.lr,
        alpha=1.0,
        temperature=temperature,
        seed=seed,
        device="cpu",
        extra_augment=",".join(filter(None, map(TRICKS.get, tricks))) or None,
        ema=0.999 if "ema" in tricks else None,
    )
    data: JoinedData
    if views:
        data = join(
            source,
            replace(cache, header=replace(cache.header, views=views)),
            augment=None,
            temperatures=[temperature],
            device=accelerator.device,
            rotate=not variant.startswith("in step"),
        )
        data = MixedData(**vars(data)) if "mixup" in tricks else data
    else:
        hard_labels = hard_label_data(source, options.augment, 1000 + seed, cache.header.classes)
        data = (
            LiveData(**vars(hard_labels), teacher=teacher, temperatures=(temperature,))
            if variant == "live teacher"
            else InconsistentData(
                **vars(hard_labels), plain=open_cache(folder / "plain.h5"), temperature=temperature
            )
        )
    trained = fit(config, accelerator, [data], None)[0]
    return evaluate(trained, teacher, test, temperature)


def evaluate(trained: Student, teacher: Ensemble, test: Source, temperature: float) -> Outcome:
    """Errors and KL(teacher ‖ student) on test images without augmentation."""
    model = trained.final_model.eval()
    errors, kl = 0, 0.0
    with torch.inference_mode():
        for batch in loader(test, sequential_batches(len(test), 500)):
            inputs = to_float(batch.inputs)
            logits = model(inputs)
            errors += int((logits.argmax(-1) != batch.labels).sum())
            log_probs = teacher.log_probs(inputs, temperature)
            kl += float(soft_loss(logits, log_probs, temperature)) * len(inputs)
    return {"errors": errors, "kl": kl / len(test)}


def report(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Print the table and the number of views that suffice, and draw the plot."""
    header = open_cache(folder / "views.h5").header
    rows = [
        [variant, *(f"{value:{form}}" for name, form in FORMS.items() for value in metrics[name])]
        for variant, metrics in results.items()
    ]
    print(
        f"\n{header.samples:,} samples of {options.data}, student {options.student}, "
        f"{options.epochs} epochs, augment {options.augment}, T = {options.temperature:g}, "
        f"{len(options.seeds)} seeds; {machine()}\n"
    )
    headings = ["soft targets", "test errors", "± s.e.", "KL", "± s.e."]
    print(tabulate(rows, headers=headings, disable_numparse=True))
    live, error = results["live teacher"]["errors"]
    sufficient = [v for v in options.views if results[cached(v)]["errors"][0] <= live + error]
    if sufficient:
        views = min(sufficient)
        size = views * header.samples * header.bytes_per_row
        print(
            f"\nWith {views} views ({size:,} bytes of rows), the cache is within one standard error of the "
            f"live teacher, or better. The dump takes {views} passes of the teacher, once; the live "
            f"teacher takes {options.epochs} for each student."
        )
    else:
        print("\nNo number of views is within one standard error of the live teacher.")
    if options.plot:
        draw(results, options)


def cached(views: int) -> str:
    """The name of a variant with cached views."""
    return f"cache, {views} view{'s' * (views > 1)}"


def draw(results: Results, options: argparse.Namespace) -> None:
    """Plot both metrics against the number of cached views."""
    plt = pyplot()
    plt.switch_backend("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    labels = {"errors": "test errors", "kl": "KL(teacher ‖ student) on test images"}
    for panel, (metric, label) in zip(panels, labels.items(), strict=True):
        values = [results[cached(views)][metric] for views in options.views]
        means, errors = zip(*values, strict=True)
        panel.errorbar(options.views, means, errors, marker="o", label="cached views")
        lines = {"live teacher": "tab:green", "inconsistent": "tab:red"}
        for variant, colour in lines.items():
            if variant not in results:
                continue
            mean, error = results[variant][metric]
            panel.axhline(mean, color=colour, label=variant)
            panel.axhspan(mean - error, mean + error, color=colour, alpha=0.2)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("cached views")
        panel.set_ylabel(label)
        panel.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()

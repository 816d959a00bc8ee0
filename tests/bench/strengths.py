"""Where a cache gains most over hard labels: five experiments on the first 8,000 images of MNIST.

    labels      few images have a label: hard labels on those alone, soft targets on all images
    patience    trainings of 2 to 128 epochs
    ensembles   teachers of 1, 2 and 4 networks
    missing     images without any 3; soft targets at T = 8, and the bias for 3 corrected for all students
    noise       0, 20 and 40 % wrong labels, from which the teacher has learned too

The teachers of `ensembles` and `noise` are networks that are trained here; the others use the one in data/.
The student has 5 % of their parameters, and in `ensembles` as many as each of them. Test errors of 10,000
images, mean and standard error over the seeds. --plots draws one figure for each experiment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate

import softcache
from softcache.cache import open_cache
from softcache.cli.demo_commands import TEACHER
from softcache.data.loader import loader, sequential_batches
from softcache.data.open import open_source
from softcache.models.evaluate import evaluate
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.loop import train
from softcache.train.student import Student
from softcache.util.tensors import to_float
from tests.bench import first_samples, machine, work_folder
from tests.bench.frontier import pyplot
from tests.bench.pool import mean_and_error

SAMPLES = 8000
STUDENT, NETWORK = "mlp:32", "mlp:400,400"
AUGMENT, VIEWS, EPOCHS = "shift:2", 8, 32
MISSING = 3
HARD, SOFT = "hard labels", "soft targets"

Point = dict[str, Any]  # what is varied, and errors over the seeds by kind of student


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS))
    parser.add_argument("--data", default="idx:data/mnist")
    parser.add_argument("--weights", type=Path, default=Path("data/teacher.safetensors"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plots", type=Path, help="folder for the figures (needs matplotlib)")
    parser.add_argument("--folder", type=Path, help="a rerun continues from its results")
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        options.train = first_samples(options.data, SAMPLES, folder)
        for name in options.experiments:
            file = folder / f"{name}.json"
            if not file.exists():
                part = folder / name
                part.mkdir(exist_ok=True)
                file.write_text(json.dumps(EXPERIMENTS[name](options, part)))
            points = json.loads(file.read_text())
            print(f"\n{name}\n{tabulate([shown(point) for point in points], headers='keys')}")
            if options.plots:
                draw(name, points, options.plots / f"strengths_{name}.png")
    print(f"\n{STUDENT}, {options.seeds} seeds; {machine()}")


def labels(options: argparse.Namespace, folder: Path) -> list[Point]:
    images, classes = arrays(options.train)
    unlabelled = save(folder / "unlabelled.npz", images, np.full_like(classes, -1))
    cache = dumped(options, unlabelled, folder)
    soft = errors(options, folder, unlabelled, cache)
    points = []
    for count in (100, 300, 1000, 3000, SAMPLES):
        data = save(folder / f"labelled-{count}.npz", images[:count], classes[:count])
        epochs = EPOCHS * SAMPLES // count  # as many steps
        hard = errors(options, folder, data, epochs=epochs)
        points.append({"labels": count, HARD: hard, SOFT: soft})
    return points


def patience(options: argparse.Namespace, folder: Path) -> list[Point]:
    cache = dumped(options, options.train, folder)
    return [
        {
            "epochs": epochs,
            HARD: errors(options, folder, options.train, epochs=epochs),
            SOFT: errors(options, folder, options.train, cache, epochs=epochs),
        }
        for epochs in (2, 4, 8, 16, 32, 64, 128)
    ]


def ensembles(options: argparse.Namespace, folder: Path) -> list[Point]:
    weights = [
        trained_teacher(options, options.train, folder / f"teacher-{n}", n) for n in range(4)
    ]
    hard = errors(options, folder, options.train, student=NETWORK)
    points = []
    for count in (1, 2, 4):
        cache = dumped(
            options, options.train, folder, name=f"{count}.h5", teacher=[NETWORK] * count,
            weights=weights[:count],
        )  # fmt: skip
        soft = errors(options, folder, options.train, cache, student=NETWORK)
        points.append(
            {"networks": count, "teacher": [teacher_errors(cache)], HARD: hard, SOFT: soft}
        )
    return points


def missing(options: argparse.Namespace, folder: Path) -> list[Point]:
    images, classes = arrays(options.train)
    kept = classes != MISSING
    data = save(folder / "missing.npz", images[kept], classes[kept])
    cache = dumped(options, data, folder)
    rows = {
        HARD: corrected(options, folder, data),
        SOFT: corrected(options, folder, data, cache, temperature=8.0),
    }
    return [
        {"test images": text, **{name: rows[name][number] for name in rows}}
        for number, text in enumerate((f"of a {MISSING}", "of other digits"))
    ]


def noise(options: argparse.Namespace, folder: Path) -> list[Point]:
    images, classes = arrays(options.train)
    random = np.random.default_rng(0)
    points = []
    for share in (0.0, 0.2, 0.4):
        wrong = random.random(len(classes)) < share
        noisy = np.where(wrong, (classes + random.integers(1, 10, len(classes))) % 10, classes)
        data = save(folder / f"noise-{share:g}.npz", images, noisy)
        weights = trained_teacher(options, data, folder / f"teacher-{share:g}", 0)
        cache = dumped(
            options, data, folder, name=f"{share:g}.h5", teacher=[NETWORK], weights=[weights]
        )
        hard, soft = errors(options, folder, data), errors(options, folder, data, cache)
        points.append(
            {"wrong labels": share, "teacher": [teacher_errors(cache)], HARD: hard, SOFT: soft}
        )
    return points


EXPERIMENTS: Mapping[str, Callable[[argparse.Namespace, Path], list[Point]]] = {
    "labels": labels,
    "patience": patience,
    "ensembles": ensembles,
    "missing": missing,
    "noise": noise,
}


def arrays(spec: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    loaded = np.load(spec.removeprefix("npz:"))
    return loaded["x"], loaded["y"]


def save(path: Path, images: npt.NDArray[Any], classes: npt.NDArray[Any]) -> str:
    np.savez(path, x=images, y=classes)
    return f"npz:{path}"


def trained_teacher(options: argparse.Namespace, data: str, folder: Path, seed: int) -> Path:
    if (folder / "student.safetensors").exists():
        return folder / "student.safetensors"
    softcache.train(
        student=NETWORK, data=data, eval_data=f"{options.data}@test", augment=AUGMENT, epochs=24,
        classes=10, seed=seed, out=folder, device="cpu", overwrite=True,
    )  # fmt: skip
    return folder / "student.safetensors"


def dumped(
    options: argparse.Namespace, data: str, folder: Path, *, name: str = "cache.h5",
    teacher: Sequence[str] = (TEACHER,), weights: Sequence[Path] = (),
) -> Path:  # fmt: skip
    path = folder / name
    softcache.dump(
        teacher=list(teacher), weights=list(weights) or options.weights, data=data,
        eval_data=f"{options.data}@test", augment=AUGMENT, views=VIEWS, classes=10, out=path, device="cpu",
        overwrite=True,
    )  # fmt: skip
    return path


def students(
    options: argparse.Namespace, folder: Path, data: str, cache: Path | None = None, *,
    epochs: int = EPOCHS, temperature: float | None = None, student: str = STUDENT,
) -> list[Student]:  # fmt: skip
    """Students of all seeds, with the default settings; of labels alone without a cache."""
    config = TrainConfig(
        students=[
            StudentConfig(student=student, seed=seed, temperature=temperature)
            for seed in range(options.seeds)
        ],
        caches=[cache] if cache else [], data=[data], epochs=epochs,
        augment=None if cache else AUGMENT, classes=10, out=folder / "run", overwrite=True, device="cpu",
    )  # fmt: skip
    return train(config)


def errors(options: argparse.Namespace, *arguments: Any, **choices: Any) -> list[int]:
    """The test errors of the same students."""
    test = open_source(f"{options.data}@test")
    device = torch.device("cpu")
    return [
        evaluate(student.final_model.eval(), test, 10, device).errors
        for student in students(options, *arguments, **choices)
    ]


def corrected(options: argparse.Namespace, *arguments: Any, **choices: Any) -> list[list[int]]:
    """Errors on test images of the missing digit, and on all others, once its bias is corrected.

    No student has ever been told of that digit, so all put it last. The bias is raised until a tenth of the
    test images are taken for it, which needs no labels.
    """
    test = open_source(f"{options.data}@test")
    counts = []
    for student in students(options, *arguments, **choices):
        model = student.final_model.eval()
        logits, truth = [], []
        with torch.inference_mode():
            for batch in loader(test, sequential_batches(len(test), 1000)):
                logits.append(model(to_float(batch.inputs)))
                truth.append(batch.labels)
        scores, classes = torch.cat(logits), torch.cat(truth)
        others = scores.clone()
        others[:, MISSING] = -torch.inf
        scores[:, MISSING] += (others.amax(1) - scores[:, MISSING]).quantile(0.1)
        wrong = classes[scores.argmax(1) != classes].bincount(minlength=10).numpy()
        counts.append([int(wrong[MISSING]), int(wrong.sum() - wrong[MISSING])])
    return [list(column) for column in zip(*counts, strict=True)]


def teacher_errors(cache: Path) -> int:
    evaluation = open_cache(cache).header.evaluation
    assert evaluation is not None
    return int(evaluation["errors"])


def shown(point: Point) -> dict[str, str]:
    """A row of a table."""
    return {
        name: "{:.0f} ± {:.0f}".format(*mean_and_error(value)) if isinstance(value, list) and len(value) > 1
        else str(value[0] if isinstance(value, list) else value)
        for name, value in point.items()
    }  # fmt: skip


def draw(name: str, points: Sequence[Point], path: Path) -> None:
    """Test errors against what is varied."""
    plt = pyplot()
    plt.switch_backend("Agg")
    figure, panel = plt.subplots(figsize=(5, 3.5))
    varied = next(iter(points[0]))
    places = range(len(points))
    for kind, colour in ((HARD, "tab:orange"), (SOFT, "tab:blue")):
        means, spreads = zip(*(mean_and_error(point[kind]) for point in points), strict=True)
        panel.errorbar(places, means, spreads, marker="o", color=colour, label=kind)
    if "teacher" in points[0]:
        panel.plot(places, [p["teacher"][0] for p in points], "k:", label="teacher")
    panel.set_xticks(
        places, [f"{p[varied]:.0%}" if name == "noise" else str(p[varied]) for p in points]
    )
    panel.set_xlabel(varied)
    panel.set_ylabel("test errors of 10,000" if name != "missing" else "test errors")
    panel.set_yscale("log")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

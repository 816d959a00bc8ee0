"""What soft targets gain over hard labels, on several tasks, budgets, shares of labels and sizes of student.

A teacher is trained on the labels of each task and dumped once. Then, for each budget, students of every
temperature and weight of the soft targets share the batches of one run with their hard-label baselines. The
line of a setting shows the mean number of test errors over the seeds, and its standard error.

    mnist       handwritten digits in data/mnist, moved by up to 2 pixels
    digits      8x8 digits that scikit-learn ships
    glyphs      characters of the fonts that matplotlib ships, turned and scaled (needs pillow)
    sources     which package a piece of Python source is from, by counts of hashed trigrams
    table       clusters in 30 columns, made by scikit-learn
    names       which language a name of a country, language or currency is from, by counts of hashed
                trigrams; `pip install babel` has the names
    cifar       --cifar SPEC, colour images with the splits train and test

With --live there are also students of the live teacher, on new views in every epoch. The losses
`standardized` and `dist` exist only here: they did not earn a place in softcache.

Results are appended to --out as JSON lines, from which a rerun continues and --report makes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional

import softcache
from softcache.cache import open_cache
from softcache.data.augment import Augmentation
from softcache.data.open import open_source
from softcache.divergences import LOSSES, LossKind, kl
from softcache.dump.config import DumpConfig
from softcache.dump.prepare import load_teachers
from softcache.join.joined_data import hard_label_data
from softcache.models.calibration import calibration_of
from softcache.models.evaluate import Evaluation
from softcache.targets.decode import to_dense
from softcache.train.accelerator import make_accelerator
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.defaults import with_defaults
from softcache.train.loop import fit, train
from softcache.train.student import Student
from softcache.types import Labels, Targets
from tests.bench import machine, work_folder
from tests.bench.live_teacher import LiveData

Arrays = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]  # inputs (N, *shape) and labels (N,)
PACKAGES = (
    "torch",
    "numpy",
    "matplotlib",
    "sympy",
    "transformers",
    "datasets",
    "jinja2",
    "botocore",
)
LANGUAGES = (
    "fi en sv tr fr cs nl lt de nb et pl it ca vi hr sk da pt hu es cy id br sl gd az ro lv eu"
)
TRIGRAMS = 512  # columns of `sources` and `names`
LINES = 12  # of a piece of source


@dataclass(frozen=True)
class Task:
    """A task: its data, its teacher, and two students of about 5 % and 25 % of the teacher's parameters.

    Attributes:
        make: returns the training and the test arrays.
        teacher: specification of the teacher.
        epochs: epochs of the teacher.
        students: specifications of the students.
        augment: augmentation of the views; None for a single view.
        budgets: epochs of the students.
    """

    make: Callable[[argparse.Namespace], tuple[Arrays, Arrays]]
    teacher: str
    epochs: int
    students: tuple[str, str]
    augment: str | None
    budgets: tuple[int, int, int]


def mnist(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    parts = []
    for split, count in (("train", 8000), ("test", 10_000)):
        inputs, labels = open_source(f"idx:{options.mnist}@{split}").fetch(range(count))
        parts.append((inputs.numpy(), labels))
    return parts[0], parts[1]


def cifar(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    parts = []
    for split in ("train", "test"):
        source = open_source(f"{options.cifar}?shuffle=0&samples=5000@{split}")
        inputs, labels = source.fetch(range(len(source)))
        parts.append((inputs.numpy(), labels))
    return parts[0], parts[1]


def digits(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    loaded = import_module("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    inputs = (loaded.images / 16).astype(np.float32)[order, None]
    labels = loaded.target.astype(np.int64)[order]
    return (inputs[:900], labels[:900]), (inputs[900:], labels[900:])


def table(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    inputs, labels = import_module("sklearn.datasets").make_classification(
        12_000, 30, n_informative=15, n_classes=10, n_clusters_per_class=3, class_sep=1.2, flip_y=0.05,
        random_state=0,
    )  # fmt: skip
    inputs, labels = inputs.astype(np.float32), labels.astype(np.int64)
    return (inputs[:6000], labels[:6000]), (inputs[6000:], labels[6000:])


def sources(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    rows, labels = [], []
    random = np.random.default_rng(0)
    for label, package in enumerate(PACKAGES):
        files = sorted(Path(sysconfig.get_path("purelib"), package).rglob("*.py"))
        random.shuffle(files)
        pieces: list[str] = []
        for file in files:
            lines = file.read_text(errors="replace").splitlines()
            pieces += ["\n".join(lines[i : i + LINES]) for i in range(0, len(lines), 40)]
            if len(pieces) >= 1500:
                break
        for piece in pieces[:1500]:
            rows.append(trigrams(piece))
            labels.append(label)
    order = random.permutation(len(rows))
    inputs, targets = np.stack(rows)[order], np.array(labels, np.int64)[order]
    half = len(rows) // 2
    return (inputs[:half], targets[:half]), (inputs[half:], targets[half:])


def names(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    babel = import_module("babel")
    rows, labels = [], []
    random = np.random.default_rng(0)
    for label, language in enumerate(LANGUAGES.split()):
        locale = babel.Locale.parse(language)
        kinds = locale.territories, locale.languages, locale.currencies
        texts = sorted({text for kind in kinds for text in kind.values() if len(text) > 3})
        for text in random.permutation(texts)[:450]:
            rows.append(trigrams(f" {text} "))
            labels.append(label)
    order = random.permutation(len(rows))
    inputs, targets = np.stack(rows)[order], np.array(labels, np.int64)[order]
    return (inputs[:6000], targets[:6000]), (inputs[6000:], targets[6000:])


def trigrams(text: str) -> npt.NDArray[np.float32]:
    """The logarithms of 1 + how often each of TRIGRAMS groups of hashed trigrams occurs in a text."""
    grams = [text[i : i + 3] for i in range(len(text) - 2)]
    counts = np.bincount(
        [zlib.crc32(gram.encode()) % TRIGRAMS for gram in grams], minlength=TRIGRAMS
    )
    return np.log1p(counts).astype(np.float32)


def glyphs(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    characters = [chr(c) for c in (*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0x3B1, 0x3CA))]
    characters += [chr(c) for c in range(0x430, 0x450)]
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
             "DejaVuSansMono.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif-Italic.ttf")  # fmt: skip
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / name), 20) for name in names]
    random = np.random.default_rng(0)
    parts = []
    for count in (60, 40):
        images, labels = [], []
        for label, character in enumerate(characters):
            for _ in range(count):
                image = Image.new("L", (28, 28))
                place = random.integers(2, 9), random.integers(-2, 5)
                ImageDraw.Draw(image).text(
                    (int(place[0]), int(place[1])),
                    character,
                    255,
                    font=fonts[random.integers(len(fonts))],
                )
                turned = image.rotate(float(random.uniform(-25, 25)), Image.Resampling.BILINEAR)
                side = int(random.integers(18, 29))
                small = turned.resize((side, side)).resize((20, 20))
                images.append(np.asarray(small, np.uint8)[None])
                labels.append(label)
        order = random.permutation(len(images))
        parts.append((np.stack(images)[order], np.array(labels, np.int64)[order]))
    return parts[0], parts[1]


TASKS: Mapping[str, Task] = {
    "mnist": Task(mnist, "mlp:400,400", 20, ("mlp:32", "mlp:128"), "shift:2", (2, 8, 32)),
    "digits": Task(digits, "mlp:200,200", 60, ("mlp:36", "mlp:160"), "shift:1", (8, 32, 128)),
    "table": Task(table, "mlp:300,300", 15, ("mlp:128", "mlp:128,128"), None, (2, 8, 32)),
    "sources": Task(sources, "mlp:256,128", 12, ("mlp:16", "mlp:64"), None, (2, 8, 32)),
    "glyphs": Task(glyphs, "cnn:16,32,64,128", 12, ("cnn:8,12,24", "cnn:12,24,48"), "shift:2", (2, 8, 32)),
    "names": Task(names, "mlp:256,128", 10, ("mlp:16", "mlp:64"), None, (2, 8, 32)),
    "cifar": Task(
        cifar, "cnn:16,32x2,64x2", 24, ("cnn:6,12,24", "cnn:14,28,56"), "crop:0.6,flip", (2, 8, 32)
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=[name for name in TASKS if name != "cifar"])
    parser.add_argument("--mnist", default="data/mnist")
    parser.add_argument("--cifar", default="", help="data with splits train and test")
    parser.add_argument("--labels", nargs="+", type=float, default=[1.0, 0.1, 0.0], help="shares")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.5, 1, 2, 4, 8])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--losses", nargs="+", default=["kl"])
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[2e-3], help="peak learning rates"
    )
    parser.add_argument("--warmups", nargs="+", type=float, default=[0.05])
    parser.add_argument(
        "--default", action="store_true", help="the defaults of softcache train too"
    )
    parser.add_argument("--live", action="store_true", help="the same from the live teacher")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--budgets", nargs="+", type=int, default=[0, 1, 2], help="0 short, 1 medium, 2 long"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[0, 1], help="0 small, 1 large student"
    )
    parser.add_argument("--out", type=Path, default=Path("gains.jsonl"))
    parser.add_argument("--report", action="store_true", help="only make the tables of --out")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    done = read(options.out)
    LOSSES.update(OTHER_LOSSES)
    if not options.report:
        with work_folder(options.folder) as folder:
            for name in options.tasks:
                run_task(name, options, folder / name, done)
    print(f"\n{machine()}")
    for heading, rows in tables(read(options.out)):
        print(f"\n{heading}")
        print(tabulate(rows, headers="keys", disable_numparse=True))


def read(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_task(
    name: str, options: argparse.Namespace, folder: Path, done: Sequence[Mapping[str, Any]]
) -> None:
    """Train the teacher of a task, dump it once for each share of labels, and train all students."""
    task = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.npz"
    if not data.exists():
        (x, y), (x_test, y_test) = task.make(options)
        np.savez(data, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    weights = folder / "teacher" / "student.safetensors"
    if not weights.exists():
        augment = {"augment": task.augment} if task.augment else {}
        softcache.train(
            student=task.teacher, data=f"npz:{data}", eval_data=f"npz:{data}@test", out=weights.parent,
            epochs=task.epochs, device="cpu", **augment,
        )  # fmt: skip
    facts = json.loads((weights.parent / "config.json").read_text())
    for share in options.labels:
        part, cache = folder / f"labels-{share:g}.npz", folder / f"labels-{share:g}.h5"
        if not cache.exists():
            write_part(data, part, share)
            views = {"views": options.views, "augment": task.augment} if task.augment else {}
            softcache.dump(
                teacher=task.teacher, weights=weights, data=f"npz:{part}", temperature=1.0, out=cache,
                classes=facts["classes"], device="cpu", **views,
            )  # fmt: skip
        for budget in options.budgets:
            for size in options.sizes:
                key = {"task": name, "labels": share, "budget": budget, "size": size}
                if any(all(row[k] == v for k, v in key.items()) for row in done):
                    continue
                rows = students_of(task, options, key, part, cache, data, folder)
                if options.live and key["labels"] == 1:
                    rows += live_students(task, options, key, part, cache, data, folder)
                teacher = {"teacher": facts["errors"], "samples": facts["samples"]}
                with options.out.open("a") as file:
                    file.writelines(json.dumps(key | teacher | row) + "\n" for row in rows)
                print(f"{key}: done", flush=True)


def write_part(data: Path, part: Path, share: float) -> None:
    """The training data with only a share of the labels."""
    arrays = np.load(data)
    labels = arrays["y_train"].copy()
    hidden = np.random.default_rng(1).random(len(labels)) >= share
    labels[hidden] = -1
    np.savez(part, x_train=arrays["x_train"], y_train=labels)


def students_of(
    task: Task, options: argparse.Namespace, key: Mapping[str, Any], part: Path, cache: Path,
    data: Path, folder: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """The test errors of all students of a run, and of their baselines where there are labels."""
    spec = task.students[int(key["size"])]
    alphas = options.alphas if key["labels"] else [1.0]
    students = [
        StudentConfig(
            student=spec, temperature=t, alpha=alpha, loss=loss, learning_rate=rate, warmup=warmup,
            seed=seed,
        )
        for t in options.temperatures
        for alpha in alphas
        for loss in options.losses
        for rate in options.rates
        for warmup in options.warmups
        for seed in range(options.seeds)
    ]  # fmt: skip
    if options.default:
        defaults = [
            dataclasses.replace(default_student(task, key, cache), seed=seed)
            for seed in range(options.seeds)
        ]
        students += [student for student in defaults if student not in students]
    config = TrainConfig(
        students=students, caches=[cache], data=[f"npz:{part}"], eval_data=f"npz:{data}@test",
        epochs=task.budgets[int(key["budget"])], baseline=bool(key["labels"]), out=folder / "run",
        overwrite=True, device="cpu", verify=False,
    )  # fmt: skip
    default = default_student(task, key, cache)
    return [
        result(
            student,
            "default" if dataclasses.replace(student.config, seed=0) == default else "cache",
        )
        for student in train(config)
    ]


def default_student(task: Task, key: Mapping[str, Any], cache: Path) -> StudentConfig:
    """The student of a setting, with the defaults of softcache train filled in."""
    config = TrainConfig(
        students=[StudentConfig(student=task.students[int(key["size"])])],
        caches=[cache], data=["npz:unused"], epochs=task.budgets[int(key["budget"])], out=cache,
    )  # fmt: skip
    (student,) = with_defaults(config, [open_cache(cache)])[0].students
    return dataclasses.replace(
        student, alpha=1.0, loss="kl", learning_rate=student.peak_learning_rate
    )


def live_students(
    task: Task, options: argparse.Namespace, key: Mapping[str, Any], part: Path, cache: Path,
    data: Path, folder: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """The same for students with the default settings, taught by the live teacher."""
    student = default_student(task, key, cache)
    config = TrainConfig(
        students=[dataclasses.replace(student, seed=seed) for seed in range(options.seeds)],
        caches=[cache], data=[f"npz:{part}"], eval_data=f"npz:{data}@test",
        epochs=task.budgets[int(key["budget"])], out=folder / "live", overwrite=True, device="cpu",
    )  # fmt: skip
    source, eval_source = open_source(config.data[0]), open_source(str(config.eval_data))
    weights = folder / "teacher" / "student.safetensors"
    teacher = load_teachers(
        DumpConfig(
            teacher=task.teacher, weights=weights, data=config.data[0], temperature=1.0, out=cache,
            device="cpu",
        ),
        source,
        Augmentation(None, 0),
    )  # fmt: skip
    classes = open_cache(cache).header.classes
    parts = LiveData(
        **vars(hard_label_data(source, task.augment, 1, classes)),
        teacher=teacher,
        temperatures=(float(student.temperature or 1),),
    )
    students = fit(config, make_accelerator("cpu", "fp32"), [parts], eval_source)
    return [result(student, "live") for student in students]


def result(student: Student, kind: str) -> dict[str, Any]:
    """What is kept of a student."""
    if student.evaluation is None:
        raise SystemExit(f"{student.name} was not evaluated")
    baseline = student.alpha == 0
    return {
        "kind": "hard" if baseline else kind,
        "temperature": 0.0 if baseline else student.temperature,
        "alpha": student.alpha,
        "loss": "hard" if baseline else student.config.loss,
        "rate": student.config.peak_learning_rate,
        "warmup": student.config.warmup,
        "seed": student.config.seed,
        "errors": student.evaluation.errors,
        "ece": calibration_error(student.evaluation),
    }


def calibration_error(evaluation: Evaluation) -> float:
    """The expected calibration error at temperature 1."""
    assert evaluation.confidence is not None
    correct = evaluation.predictions == evaluation.labels
    return calibration_of(evaluation.confidence.astype(float), np.asarray(correct, float)).error


def standardized(
    log_q: Tensor, targets: Targets, labels: Labels | None, temperature: float
) -> Tensor:
    """T² KL of the logits divided by their standard deviations: Sun et al., arXiv 2403.01427."""

    def scaled(rows: Tensor) -> Tensor:
        rows = rows - rows.mean(-1, keepdim=True)
        return functional.log_softmax(rows / rows.std(-1, keepdim=True) / temperature, -1)

    return temperature**2 * kl(scaled(log_q), scaled(to_dense(targets)))


def dist(log_q: Tensor, targets: Targets, labels: Labels | None, weight: float) -> Tensor:
    """1 - the correlations within rows and within classes: Huang et al., arXiv 2205.10536."""

    def distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = (values - values.mean(dim, keepdim=True) for values in (a, b))
        return 1 - functional.cosine_similarity(a, b, dim)

    q, p = log_q.exp(), to_dense(targets).exp()
    return weight * (distance(q, p, 1) + distance(q, p, 0).mean())


OTHER_LOSSES = {
    "standardized": LossKind("standardized:T", "", standardized, 2.0),
    "dist": LossKind("dist:WEIGHT", "", dist, 1.0),
}


def tables(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """For each task and share of labels, a table with a line for each budget, size and setting."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = defaultdict(list)
    for row in results:
        groups[row["task"], row["labels"]].append(row)
    for (task, share), rows in groups.items():
        runs: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            name = row["kind"]
            if name == "cache":
                name = f"T={row['temperature']:g} a={row['alpha']:g}"
            name += "" if row["loss"] in ("hard", "kl") else f" {row['loss']}"
            name += "" if row["rate"] == 2e-3 else f" lr={row['rate']:g}"
            name += "" if row["warmup"] == 0.05 else f" warmup={row['warmup']:g}"
            runs[row["budget"], row["size"]][name].append(row["errors"])
        lines = []
        for (budget, size), settings in sorted(runs.items()):
            line = {"budget": str(budget), "student": ("small", "large")[size]}
            best = min(statistics.fmean(errors) for errors in settings.values())
            for name, errors in settings.items():
                mean = statistics.fmean(errors)
                error = (
                    statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
                )
                line[name] = f"{mean:.0f} ± {error:.0f}{' *' if mean == best else ''}"
            lines.append(line)
        first = rows[0]
        yield (
            f"{task}, {share:.0%} of the labels; teacher {first['teacher']} errors of {first['samples']}",
            lines,
        )


if __name__ == "__main__":
    main()

"""Inputs that people really have: each ends with the right number, a refusal, or a warning, last."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import Cache, open_cache
from tests.cli.app_cases import softcache
from tests.conftest import Run

pillow = pytest.importorskip("PIL.Image")

MODELS = '''
import torch
from torch import nn

class Lines(nn.Module):
    """The class is the number of the brightest line of an image."""

    def __init__(self, order=None, names=()):
        super().__init__()
        self.order = order
        if names:
            self.class_names = names

    def forward(self, x):
        logits = 12 * x[:, 0].mean(2)
        return logits if self.order is None else logits[:, self.order]

def lines():
    return Lines()

def as_text():
    return Lines([0, 2, 3, 1])

def permuted():
    return Lines([2, 0, 1], ["c", "a", "b"])

def words():
    return Lines([0, 1, 2], ["ant", "bee", "cat"])

def four():
    return Lines([0, 1, 2, 3], ["a", "b", "c", "d"])

class Channels(nn.Module):
    def forward(self, x):
        return 30 * x.mean((2, 3))

def channels():
    return Channels()

class Columns(nn.Module):
    """A row is in class 1 if its first column is above 0.5."""

    def forward(self, x):
        z = 20 * (x[:, 0] - 0.5)
        return torch.stack([-z, z], 1)

def columns():
    return Columns()
'''


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "lines.py"
    path.write_text(MODELS)
    return path


def line_images(classes: npt.NDArray[np.int64], side: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Images (N, side, side) in which one line is bright."""
    images = np.random.default_rng(seed).integers(0, 40, (len(classes), side, side), np.uint8)
    images[np.arange(len(classes)), classes] += 200
    return images


def write_folder(
    folder: Path, names: Sequence[str], *, side: int | None = None, each: int = 10, seed: int = 0
) -> Path:
    """A folder of images for each name, in which the number of the name is the bright line."""
    for number, name in enumerate(names):
        classes = np.full(each, number)
        (folder / name).mkdir(parents=True)
        for index, image in enumerate(line_images(classes, side or len(names), seed + number)):
            pillow.fromarray(image).save(folder / name / f"{index}.png")
    return folder


def dumped(models: Path, teacher: str, data: str, *options: str) -> Cache:
    """The cache of a dump that ends well, without a warning."""
    result = softcache(*command(models, teacher, data, *options))
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    return open_cache(models.parent / "c.h5")


def command(models: Path, teacher: str, data: str, *options: str) -> list[str]:
    out = str(models.parent / "c.h5")
    return ["dump", "--teacher", f"{models}:{teacher}", "--data", data, "-o", out, *options]


def agreement(cache: Cache) -> float:
    return float((cache.header.summary or {})["agreement"])


def test_hidden_files_are_no_data_and_images_may_lie_deeper(tmp_path: Path, models: Path) -> None:
    folder = write_folder(tmp_path / "d", ["a", "b", "c"])
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "a" / "._0.png").write_bytes(b"Mac OS X")
    (folder / "a" / "day1").mkdir()
    (folder / "a" / "1.png").rename(folder / "a" / "day1" / "1.png")
    cache = dumped(models, "lines", f"folder:{folder}")
    assert (agreement(cache), cache.header.samples, cache.header.classes) == (1, 30, 3)


def test_folders_that_count_classes_are_in_the_order_of_their_numbers(
    tmp_path: Path, models: Path
) -> None:
    folder = write_folder(tmp_path / "d", [str(number) for number in range(12)])
    cache = dumped(models, "lines", f"folder:{folder}")
    assert agreement(cache) == 1
    assert cache.class_names[9:] == ["9", "10", "11"]


def test_folders_of_other_numbers_are_in_the_order_of_torchvision(
    tmp_path: Path, models: Path
) -> None:
    folder = write_folder(tmp_path / "d", ["0", "90", "180", "270"])
    cache = dumped(models, "as_text", f"folder:{folder}", "--eval-data", f"folder:{folder}")
    assert agreement(cache) == 1
    assert cache.class_names == ["0", "180", "270", "90"]


def test_evaluation_data_without_a_class_keep_their_labels(tmp_path: Path, models: Path) -> None:
    folder = write_folder(tmp_path / "d", ["0", "90", "180", "270"])
    test = write_folder(tmp_path / "test", ["0", "90", "180", "270"], seed=9)
    for image in (test / "180").iterdir():
        image.unlink()
    (test / "180").rmdir()
    cache = dumped(models, "as_text", f"folder:{folder}", "--eval-data", f"folder:{test}")
    assert (cache.header.evaluation or {})["errors"] == 0


def test_channels_at_the_end_come_to_the_front(tmp_path: Path, models: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    pixels = random.integers(0, 90, (60, 12, 12, 3), np.uint8)
    pixels[np.arange(60), :, :, labels] += 120
    np.savez(tmp_path / "d.npz", x=pixels, y=labels)
    options = ("--augment", "crop:0.5,flip", "--views", "2")
    assert agreement(dumped(models, "channels", f"npz:{tmp_path / 'd.npz'}", *options)) == 1


def write_table(path: Path, columns: Sequence[str], rows: int = 200) -> str:
    age, pay = np.random.default_rng(0).random((2, rows))
    values = {"age": age, "pay": pay, "zip": pay, "churn": (age > 0.5).astype(int)}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values[column] for column in columns), strict=True))
    return f"csv:{path}?label=churn"


def test_columns_are_matched_by_name(tmp_path: Path, models: Path) -> None:
    train = write_table(tmp_path / "train.csv", ["age", "pay", "churn"])
    swapped = write_table(tmp_path / "swapped.csv", ["pay", "churn", "age"])
    others = write_table(tmp_path / "others.csv", ["age", "zip", "churn"])
    cache = dumped(models, "columns", train, "--eval-data", swapped)
    assert (cache.header.evaluation or {})["errors"] == 0
    result = softcache(*command(models, "columns", train, "--eval-data", others, "--overwrite"))
    assert result.exit_code != 0
    assert "has no column 'pay'" in result.stderr
    run = str(tmp_path / "run")
    arguments = ["train", str(cache.path), "--data", swapped, "--eval-data", swapped, "-o", run]
    result = softcache(*arguments, "--student", "mlp:16", "--epochs", "60", "--batch-size", "16")
    assert result.exit_code == 0, result.output
    assert f"in another order than those of {cache.path}; matched by name" in result.stdout
    arguments[3] = others
    result = softcache(*arguments, "--student", "mlp:16", "--overwrite")
    assert result.exit_code != 0
    assert f"has no column 'pay', which {cache.path} has" in result.stderr
    compared = softcache("compare", run, "--eval-data", swapped)
    assert compared.exit_code == 0, compared.output
    same = softcache("compare", run, "--eval-data", train)
    assert compared.stdout.split("%")[0].split()[-1] == same.stdout.split("%")[0].split()[-1]


def test_names_in_another_order_are_mapped_and_other_names_refused(
    tmp_path: Path, models: Path
) -> None:
    folder = write_folder(tmp_path / "d", ["a", "b", "c"])
    data = f"folder:{folder}"
    cache = dumped(models, "permuted", data)
    assert agreement(cache) == 1
    assert cache.class_names == ["c", "a", "b"]
    result = softcache(*command(models, "words", data, "--overwrite"))
    assert result.exit_code != 0
    assert "--same-classes" in result.stderr
    assert agreement(dumped(models, "words", data, "--overwrite", "--same-classes")) == 1


def test_a_teacher_may_know_classes_that_the_data_lack(tmp_path: Path, models: Path) -> None:
    folder = write_folder(tmp_path / "d", ["a", "b", "c"], side=4)
    cache = dumped(models, "four", f"folder:{folder}")
    assert (agreement(cache), cache.header.classes) == (1, 4)
    data = f"folder:{folder}?classes=c,b,a"
    chosen = dumped(models, "four", data, "--teacher-classes", "c,b,a", "--overwrite")
    assert (agreement(chosen), chosen.class_names) == (1, ["c", "b", "a"])


@pytest.fixture
def shifted(tmp_path: Path) -> str:
    """Data whose labels are one too high, modulo the number of classes."""
    classes = np.arange(120) % 6
    np.savez(
        tmp_path / "shifted.npz", x=line_images(classes, 6)[:, None], y=(classes + 1) % 6
    )  # fmt: skip
    return f"npz:{tmp_path / 'shifted.npz'}"


def test_shifted_labels_are_the_last_line_and_an_error_with_strict(
    models: Path, shifted: str, run: Run
) -> None:
    strict = run(*command(models, "lines", shifted, "--strict"))
    assert strict.returncode != 0
    assert "Traceback" not in strict.stderr
    assert "The rows are kept" in strict.stderr
    result = run(*command(models, "lines", shifted))
    assert "resuming" in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("warning: the teacher agrees with 0.0% of the labels")
    assert "the labels look shifted by one" in last
    cache = str(models.parent / "c.h5")
    shown = softcache("info", cache)
    assert "shifted by one" in shown.stderr
    assert "confidence" in shown.stdout
    arguments = ["train", cache, "--data", shifted, "--student", "mlp:4", "--epochs", "1"]
    arguments += ["-o", str(models.parent / "run")]
    trained = softcache(*arguments)
    assert trained.exit_code == 0, trained.output
    assert "shifted by one" in trained.stderr
    refused = softcache(*arguments, "--strict", "--overwrite")
    assert refused.exit_code != 0
    assert "shifted by one" in refused.stderr


def test_evaluation_data_that_cannot_be_right_are_an_error_with_strict(
    tmp_path: Path, models: Path, shifted: str
) -> None:
    classes = np.arange(120) % 6
    np.savez(tmp_path / "right.npz", x=line_images(classes, 6)[:, None], y=classes)
    data = f"npz:{tmp_path / 'right.npz'}"
    result = softcache(*command(models, "lines", data, "--eval-data", shifted, "--strict"))
    assert result.exit_code != 0
    assert "Nothing was written" in result.stderr
    assert not list(tmp_path.glob("c.h5*"))
    result = softcache(*command(models, "lines", data, "--eval-data", shifted))
    assert result.exit_code == 0
    assert "on npz:shifted.npz@train, the teacher agrees with 0.0%" in result.stderr


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda rows: rows[::-1], "the rows of the matrix are in another order"),
        (lambda rows: rows[:, [1, 0, 2, 3, 4, 5]], "the classes look to be in another order"),
    ],
)
def test_a_matrix_in_another_order_is_refused(tmp_path: Path, change: object, cause: str) -> None:
    random = np.random.default_rng(0)
    classes = random.integers(0, 6, 240)
    np.savez(tmp_path / "d.npz", x=line_images(classes, 6)[:, None], y=classes)
    rows = random.normal(size=(240, 6)).astype(np.float32)
    rows[np.arange(240), classes] += 8
    np.save(tmp_path / "rows.npy", change(rows))  # type: ignore[operator]
    arguments = ["import", str(tmp_path / "rows.npy"), "--data", f"npz:{tmp_path / 'd.npz'}"]
    arguments += ["-o", str(tmp_path / "c.h5")]
    result = softcache(*arguments)
    assert result.exit_code != 0
    assert cause in result.stderr
    assert not (tmp_path / "c.h5").exists()
    result = softcache(*arguments, "--no-strict")
    assert result.exit_code == 0, result.output
    assert cause in result.stderr


def test_exported_labels_of_a_view_can_be_imported_for_the_same_view(
    tmp_path: Path, models: Path
) -> None:
    classes = np.arange(60) % 6
    np.savez(tmp_path / "d.npz", x=line_images(classes, 6)[:, None], y=classes)
    data = f"npz:{tmp_path / 'd.npz'}"
    views = ("--augment", "shift:2", "--views", "3", "--seed", "5", "--temperature", "1")
    softcache(*command(models, "lines", data, *views))
    cache = str(models.parent / "c.h5")
    matrix, again = str(tmp_path / "m.npy"), str(tmp_path / "again.h5")
    result = softcache("export-labels", cache, "-o", matrix, "--view", "2")
    assert "view 2 of the samples, augmented by shift:2 with seed 5" in result.stdout
    arguments = ["import", matrix, "--data", data, "--teacher-output", "probabilities"]
    arguments += ["--augment", "shift:2", "--seed", "5", "--view", "2", "-o", again, "--no-strict"]
    result = softcache(*arguments)
    assert result.exit_code == 0, result.output
    imported = open_cache(Path(again))
    assert (imported.header.first_view, imported.header.seed) == (2, 5)
    rows = np.arange(60)
    original = open_cache(Path(cache)).rows(2, rows)
    np.testing.assert_allclose(imported.rows(0, rows), original, atol=2e-2)


def test_files_that_are_no_images_can_be_left_out(tmp_path: Path, models: Path) -> None:
    folder = write_folder(tmp_path / "d", ["a", "b", "c"])
    (folder / "b" / "3.png").write_bytes(b"not an image")
    data = f"folder:{folder}"
    result = softcache(*command(models, "lines", data))
    assert result.exit_code != 0
    assert "3.png" in result.stderr
    (tmp_path / "c.h5.partial").unlink(missing_ok=True)
    cache = dumped(models, "lines", data, "--skip-unreadable")
    assert (agreement(cache), cache.header.samples) == (1, 29)
    arguments = ["train", str(cache.path), "--data", data, "--student", "mlp:4", "--epochs", "1"]
    arguments += ["-o", str(tmp_path / "run")]
    assert softcache(*arguments).exit_code != 0
    result = softcache(*arguments, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    refused = softcache(*command(models, "channels", "idx:x", "--skip-unreadable", "--overwrite"))
    assert "is idx: data" in refused.stderr


def test_samples_and_labels_that_the_cache_does_not_know(tmp_path: Path, models: Path) -> None:
    classes = np.arange(60) % 6
    images = line_images(classes, 6)[:, None]
    np.savez(tmp_path / "d.npz", x=images[:40], y=classes[:40])
    cache = dumped(models, "lines", f"npz:{tmp_path / 'd.npz'}")
    relabelled = classes.copy()
    relabelled[25] = 5
    np.savez(tmp_path / "more.npz", x=images[20:], y=relabelled[20:])
    arguments = ["train", str(cache.path), "--data", f"npz:{tmp_path / 'more.npz'}"]
    arguments += ["--student", "mlp:4", "--epochs", "1", "-o", str(tmp_path / "run")]
    assert "--known-only" in softcache(*arguments).stderr
    assert "--labels data" in softcache(*arguments, "--known-only").stderr
    result = softcache(*arguments, "--known-only", "--labels", "cache")
    assert result.exit_code == 0, result.output
    assert "20 of the 40 samples" in result.stdout.replace("note: ", "")

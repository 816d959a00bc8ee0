"""Classes of unequal size: weights in the hard loss, balanced sampling, errors by class."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.data.source import ArraySource, Source
from softcache.errors import DataError, MissingFileError, SettingsError
from softcache.join.joined_data import JoinedData, hard_label_data
from softcache.train.card import training_command
from softcache.train.class_weights import class_weights
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.sampling import BalancedBatches, balanced_probabilities
from tests.configs import replace
from tests.conftest import make_arrays
from tests.train.loop_cases import metrics, same_weights

LABELS = np.array([0] * 60 + [1] * 20 + [3] * 10 + [-1] * 10)


def data_of(labels: np.ndarray, classes: int = 4) -> JoinedData:
    inputs = np.arange(len(labels), dtype=np.float32)[:, None]
    return hard_label_data(ArraySource("data", inputs, labels), None, 0, classes)


def skewed(folder: Path, name: str = "skewed") -> str:
    """Images of 5 classes, of which the first has most samples; the specification of train and test."""
    images, labels = make_arrays(400)
    keep = (labels == 0) | (np.arange(400) % 8 == 0)
    arrays = {
        f"{letter}_{split}": values[keep]
        for split in ("train", "test")
        for letter, values in (("x", images), ("y", labels))
    }
    np.savez(folder / f"{name}.npz", **arrays)
    return f"npz:{folder / name}.npz"


@pytest.fixture
def skewed_config(tmp_path: Path) -> TrainConfig:
    """A short run on labels alone, of which most are of one class."""
    data = skewed(tmp_path)
    return make_train_config(
        student="mlp:8", data=data, eval_data=f"{data}@test", classes=5, out=tmp_path / "run",
        epochs=2, batch_size=32, device="cpu",
    )  # fmt: skip


# weights of the classes


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    # n / (C n_c) over the 90 labelled samples of 4 classes; the third has none
    expected = [90 / (4 * 60), 90 / (4 * 20), 0, 90 / (4 * 10)]
    weights = class_weights("balanced", LABELS, 4)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_a_file_has_one_number_for_each_class(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("\ufeff1\n 2.5 \n\n0\n1e-3\n", encoding="utf-8")
    np.testing.assert_allclose(class_weights(str(path), LABELS, 4), [1, 2.5, 0, 1e-3])
    with pytest.raises(SettingsError, match=r"weights.txt has 4 numbers; expected 5, one for each"):
        class_weights(str(path), LABELS, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\nx\n", r"--class-weights .*w.txt, line 2 is 'x'; expected a number of 0 or more"),
        (b"1\n\n-2\n", r"w.txt, line 3 is '-2'; expected a number of 0 or more"),
        (b"nan\n", r"line 1 is 'nan'; expected a number of 0 or more"),
        (b"1\ninf\n", r"line 2 is 'inf'; expected"),
        (b"1,2\n", r"line 1 is '1,2'; expected"),
        (b"0\n0\n", r"w.txt has no weight above 0; expected one for each class"),
        (b"", r"w.txt has no weight above 0"),
        (b"\xff\xfe1\n", r"w.txt cannot be read \(.*\); expected a text file with one number"),
    ],
)
def test_a_file_of_other_things_is_refused_before_the_work(
    content: bytes, message: str, skewed_config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "w.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        train(replace(skewed_config, class_weights=str(tmp_path / "w.txt")))
    assert not skewed_config.out.exists()


def test_a_file_that_is_not_there_is_told(skewed_config: TrainConfig) -> None:
    with pytest.raises(
        MissingFileError, match="--class-weights blanced: no such file; expected bal"
    ):
        train(replace(skewed_config, class_weights="blanced"))


def test_weights_of_a_student_are_balanced_over_its_training_data(
    skewed_config: TrainConfig, tmp_path: Path
) -> None:
    plain, weighted = (
        train(replace(skewed_config, class_weights=spec, out=tmp_path / str(spec)))[0]
        for spec in (None, "balanced")
    )
    assert plain.class_weights is None
    assert weighted.class_weights is not None
    labels = np.load(tmp_path / "skewed.npz")["y_train"]
    expected = len(labels) / (5 * np.bincount(labels))
    np.testing.assert_allclose(weighted.class_weights, expected, rtol=1e-6)
    assert not same_weights(plain.folder, weighted.folder)


def test_a_baseline_has_the_weights_of_its_student_and_those_of_the_cache(
    config: TrainConfig, cache: Cache
) -> None:
    distilled, baseline = train(replace(config, class_weights="balanced", baseline=True))
    counts = np.bincount(cache.labels, minlength=5)
    for student in (distilled, baseline):
        assert student.class_weights is not None
        np.testing.assert_allclose(student.class_weights, 300 / (5 * counts), rtol=1e-6)


def test_a_run_folder_holds_the_name_of_the_file_and_no_path(
    skewed_config: TrainConfig, tmp_path: Path
) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("1\n2\n3\n4\n5\n")
    (student,) = train(replace(skewed_config, class_weights=str(path)))
    assert student.class_weights is not None
    assert student.class_weights.tolist() == [1, 2, 3, 4, 5]
    text = (skewed_config.out / "config.json").read_text()
    assert json.loads(text)["settings"]["class_weights"] == "weights.txt"
    assert str(tmp_path) not in text
    assert "--class-weights weights.txt" in training_command(json.loads(text))


def test_two_files_of_weights_make_two_students(skewed_config: TrainConfig) -> None:
    variants = [{"class_weights": "/a/long/way/to/one.txt"}, {"class_weights": "balanced"}]
    names = replace(skewed_config, students=variants).names()
    assert names == ["class-weights=one.txt", "class-weights=balanced"]


def test_labels_are_needed(skewed_config: TrainConfig, tmp_path: Path) -> None:
    images, _ = make_arrays(50)
    np.savez(tmp_path / "unlabelled.npz", x=images)
    unlabelled = replace(skewed_config, data=f"npz:{tmp_path}/unlabelled.npz", eval_data=None)
    with pytest.raises(SettingsError, match="--class-weights balanced needs labels, but no train"):
        train(replace(unlabelled, class_weights="balanced"))
    with pytest.raises(SettingsError, match="--sampling balanced needs labels, but no training"):
        train(replace(unlabelled, sampling="balanced"))


# labels of the training data


class Unkept(Source):
    """A source that does not keep its labels, as a user's Dataset."""

    name, class_names = "dataset", ()

    def __len__(self) -> int:
        return len(LABELS)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, np.ndarray]:
        rows = np.asarray(indices)
        return torch.zeros(len(rows), 1), LABELS[rows]


def test_labels_are_found_wherever_they_are(config: TrainConfig, cache: Cache) -> None:
    np.testing.assert_array_equal(data_of(LABELS).labels(), LABELS)
    unkept = hard_label_data(Unkept(), None, 0, 4)
    np.testing.assert_array_equal(unkept.labels(), LABELS)
    with pytest.raises(DataError, match="dataset: sample 80 has label 3; expected 0 to 2, or -1"):
        hard_label_data(Unkept(), None, 0, 3).labels()
    rows = np.arange(300)[::-1]
    joined = JoinedData(Unkept(), rows, rows, None, data_of(LABELS).augmentation, 5, cache)
    np.testing.assert_array_equal(joined.labels(), cache.labels[::-1])


# balanced sampling


def drawn(batches: BalancedBatches) -> list[int]:
    return [index for request in batches for index in request.source_indices]


def test_classes_are_equally_likely_and_unlabelled_samples_keep_their_share() -> None:
    probabilities = balanced_probabilities(LABELS)
    sums = [probabilities[label == LABELS].sum() for label in (0, 1, 2, 3, -1)]
    np.testing.assert_allclose(sums, [0.3, 0.3, 0, 0.3, 0.1])
    batches = BalancedBatches(LABELS, 25, seed=0)
    counts: Counter[int] = Counter()
    for epoch in range(100):
        batches.set_epoch(epoch)
        counts.update(LABELS[drawn(batches)].tolist())
    # of 10,000 draws; the standard deviation is below 50
    assert {label: pytest.approx(3000, abs=250) for label in (0, 1, 3)} | {
        -1: pytest.approx(1000, abs=250)
    } == counts


def test_an_epoch_has_as_many_steps_and_depends_on_seed_and_epoch_alone() -> None:
    batches = BalancedBatches(LABELS, 32, seed=3)
    first = [request.source_indices for request in batches]
    assert [len(indices) for indices in first] == [32, 32, 32, 4]
    assert len(batches) == 4
    batches.set_epoch(1)
    second = drawn(batches)
    assert second != drawn(BalancedBatches(LABELS, 32, seed=3))
    assert second != drawn(BalancedBatches(LABELS, 32, seed=4))
    again = BalancedBatches(LABELS, 32, seed=3)
    again.set_epoch(0, first=2)
    assert drawn(again) == [index for indices in first[2:] for index in indices]
    assert again.order().tolist() == [index for indices in first for index in indices]
    shares = [BalancedBatches(LABELS, 32, 3, None, process, 2) for process in range(2)]
    for whole, *parts in zip(first, *shares, strict=True):
        assert [*whole[::2]] == parts[0].source_indices
        assert [*whole[1::2]] == parts[1].source_indices


def test_balanced_sampling_trains_and_is_another_run(
    skewed_config: TrainConfig, tmp_path: Path
) -> None:
    uniform = train(skewed_config)[0]
    balanced = train(replace(skewed_config, sampling="balanced", out=tmp_path / "balanced"))[0]
    again = train(replace(skewed_config, sampling="balanced", out=tmp_path / "again"))[0]
    assert uniform.steps == balanced.steps
    assert not same_weights(uniform.folder, balanced.folder)
    assert same_weights(balanced.folder, again.folder)
    facts = json.loads((balanced.folder / "config.json").read_text())
    assert "--sampling balanced" in training_command(facts)
    with pytest.raises(SettingsError, match="sampling is even; expected one of uniform, balanced"):
        replace(skewed_config, sampling="even")


# errors by class


def test_each_epoch_has_its_balanced_accuracy_and_the_errors_of_each_class(
    skewed_config: TrainConfig, tmp_path: Path
) -> None:
    (student,) = train(skewed_config)
    labels = np.load(tmp_path / "skewed.npz")["y_test"]
    samples = np.bincount(labels, minlength=5)
    lines = metrics(skewed_config.out)
    assert len(lines) == 2
    for line in lines:
        assert sum(line["class_errors"]) == line["errors"]
        shares = 1 - np.array(line["class_errors"]) / samples
        assert line["balanced_accuracy"] == pytest.approx(shares.mean())
    assert student.evaluation is not None
    assert student.evaluation.balanced_accuracy == lines[-1]["balanced_accuracy"]


def test_errors_of_very_many_classes_are_not_listed(skewed_config: TrainConfig) -> None:
    train(replace(skewed_config, classes=1000, epochs=1))
    assert len(metrics(skewed_config.out)[-1]["class_errors"]) == 1000
    train(replace(skewed_config, classes=1001, epochs=1, overwrite=True))
    assert "class_errors" not in metrics(skewed_config.out)[-1]
    assert "balanced_accuracy" in metrics(skewed_config.out)[-1]


def test_a_run_without_evaluation_has_none_of_it(skewed_config: TrainConfig) -> None:
    train(replace(skewed_config, eval_data=None))
    names = {"epoch", "step", "total", "hard", "lr"}
    assert [set(line) for line in metrics(skewed_config.out)] == [names, names]


def test_tensorboard_takes_the_numbers_and_leaves_the_lists(skewed_config: TrainConfig) -> None:
    pytest.importorskip("tensorboard")
    train(replace(skewed_config, tensorboard=True, epochs=1))
    assert list((skewed_config.out / "tensorboard").iterdir())

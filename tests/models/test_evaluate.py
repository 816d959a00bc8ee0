"""Counting a model's errors, and the digest of a data set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from softcache.data.source import ArraySource
from softcache.errors import DataError, ModelError
from softcache.models import evaluate as module
from softcache.models.evaluate import Evaluation, data_digest, evaluate
from tests.conftest import make_arrays

CPU = torch.device("cpu")
CLASSES = 4


def source_of(answers: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> ArraySource:
    """Inputs that are logits, whose largest class is in `answers`; the model `as_given` returns them."""
    return ArraySource("data", np.eye(CLASSES, dtype=np.float32)[answers], labels)


def as_given(inputs: Tensor) -> Tensor:
    return inputs


@pytest.fixture
def labels() -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, CLASSES, 50)


@pytest.mark.parametrize("wrong", [0, 1, 17, 50])
@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_the_samples_whose_top_class_is_not_the_label(
    labels: npt.NDArray[np.int64], wrong: int, workers: int
) -> None:
    answers = labels.copy()
    answers[:wrong] = (answers[:wrong] + 1) % CLASSES
    assert evaluate(as_given, source_of(answers, labels), CLASSES, CPU, workers) == Evaluation(
        wrong, 50
    )


def test_the_size_of_batches_changes_nothing(
    labels: npt.NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of((labels + (np.arange(50) % 3 == 0)) % CLASSES, labels)
    sizes: list[int] = []

    def model(inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return inputs

    monkeypatch.setattr(module, "BATCH", 16)
    assert evaluate(model, source, CLASSES, CPU) == Evaluation(17, 50)
    assert sizes == [16, 16, 16, 2]


def test_images_reach_the_model_as_floats_up_to_one() -> None:
    x, y = make_arrays(20)
    seen: list[Tensor] = []

    def model(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return torch.zeros(len(inputs), 5)

    evaluate(model, ArraySource("data", x, y), 5, CPU)
    assert seen[0].dtype == torch.float32
    np.testing.assert_allclose(seen[0], x / 255, rtol=1e-6)


def test_no_gradients_are_kept(labels: npt.NDArray[np.int64]) -> None:
    linear, requires_grad = nn.Linear(CLASSES, CLASSES), []

    def model(inputs: Tensor) -> Tensor:
        logits: Tensor = linear(inputs)
        requires_grad.append(logits.requires_grad)
        return logits

    evaluate(model, source_of(labels, labels), CLASSES, CPU)
    assert requires_grad == [False]


def test_an_unlabelled_sample_is_named(labels: npt.NDArray[np.int64]) -> None:
    labels[[33, 40]] = -1
    with pytest.raises(DataError, match="data: sample 33 has no label; evaluation needs labels"):
        evaluate(as_given, source_of(labels, labels), CLASSES, CPU)


@pytest.mark.parametrize("label", [CLASSES, -2])
def test_a_label_out_of_range_is_named(labels: npt.NDArray[np.int64], label: int) -> None:
    answers, labels[33] = labels.copy(), label
    out_of_range = rf"data: sample 33 has label {label}; expected 0 to 3"
    expected = out_of_range if label > 0 else "data: sample 33 has no label"
    with pytest.raises(DataError, match=expected):
        evaluate(as_given, source_of(answers, labels), CLASSES, CPU)


def test_a_model_that_raises_is_named_with_the_data(labels: npt.NDArray[np.int64]) -> None:
    expected = (
        r"the model raised RuntimeError on inputs \(50, 4\) of data: .*cannot be multiplied.*; "
        "evaluation inputs need the same shape as training inputs"
    )
    with pytest.raises(ModelError, match=expected):
        evaluate(nn.Linear(7, CLASSES), source_of(labels, labels), CLASSES, CPU)


def test_an_error_that_says_what_to_do_goes_through_as_it_is(
    labels: npt.NDArray[np.int64],
) -> None:
    def model(inputs: Tensor) -> Tensor:
        raise ModelError("out of memory; make batches smaller")

    with pytest.raises(ModelError, match=r"^out of memory; make batches smaller$"):
        evaluate(model, source_of(labels, labels), CLASSES, CPU)


def test_accuracy_is_the_share_of_the_others() -> None:
    assert Evaluation(0, 10).accuracy == 1
    assert Evaluation(10, 10).accuracy == 0
    assert Evaluation(38, 10_000).accuracy == pytest.approx(0.9962)


# the digest of a data set


def test_the_same_data_have_the_same_digest_however_they_are_read() -> None:
    x, y = make_arrays(20)
    digest = data_digest(ArraySource("data", x, y))
    assert digest == data_digest(ArraySource("copy", x.copy(), y.copy(), ("a", "b")))
    assert digest == data_digest(ArraySource("data", x, y), workers=2)
    assert len(digest) == 16
    assert int(digest, 16)


def test_other_data_have_another_digest() -> None:
    x, y = make_arrays(20)
    changed_pixel, changed_label = x.copy(), y.copy()
    changed_pixel[7, 0, 0, 0] ^= 1
    changed_label[7] = (changed_label[7] + 1) % 5
    variants = {
        "unchanged": (x, y),
        "a pixel": (changed_pixel, y),
        "a label": (x, changed_label),
        "reordered": (x[::-1], y[::-1]),
        "labels reordered": (x, y[::-1]),
        "shortened": (x[:-1], y[:-1]),
        "dtype": (x.astype(np.float32), y),
        "shape": (x[:, 0], y),
    }
    digests = {name: data_digest(ArraySource("data", *data)) for name, data in variants.items()}
    assert len(set(digests.values())) == len(variants)

"""Counting a model's errors, and the digest of a data set."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

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


# what is kept of an evaluation


def log_probs(inputs: Tensor) -> Tensor:
    return inputs.log_softmax(-1)


def logits_in_an_object(inputs: Tensor) -> object:
    return SimpleNamespace(logits=inputs, hidden=None)


@pytest.mark.parametrize("model", [as_given, log_probs, logits_in_an_object, Tensor.half])
def test_labels_predictions_and_confidence_are_kept(
    model: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 7)
    random = np.random.default_rng(1)
    logits = random.normal(size=(50, CLASSES)).astype(np.float32)
    labels = random.integers(0, CLASSES, 50)
    evaluation = evaluate(model, ArraySource("data", logits, labels), CLASSES, CPU)
    assert evaluation.labels is not None
    assert evaluation.predictions is not None
    assert evaluation.confidence is not None
    arrays = evaluation.labels, evaluation.predictions, evaluation.confidence
    assert [str(array.dtype) for array in arrays] == ["int32", "int32", "float32"]
    assert {array.shape for array in arrays} == {(50,)}
    np.testing.assert_array_equal(evaluation.labels, labels)
    np.testing.assert_array_equal(evaluation.predictions, logits.argmax(-1))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(evaluation.confidence, probabilities.max(-1), rtol=2e-3)
    assert evaluation.errors == (logits.argmax(-1) != labels).sum()


def of(labels: list[int], predictions: list[int]) -> Evaluation:
    arrays = np.array(labels, np.int32), np.array(predictions, np.int32)
    errors = int((arrays[0] != arrays[1]).sum())
    return Evaluation(errors, len(labels), *arrays, np.ones(len(labels), np.float32))


def test_balanced_accuracy_is_the_mean_over_the_classes_that_occur() -> None:
    evaluation = of([0] * 8 + [3, 3], [0] * 6 + [1, 1] + [3, 0])
    assert evaluation.accuracy == pytest.approx(0.7)
    assert evaluation.balanced_accuracy == pytest.approx((6 / 8 + 1 / 2) / 2)
    # a model that always says the same class
    assert of([0] * 99 + [1], [0] * 100).balanced_accuracy == pytest.approx(0.5)
    assert of([2, 2], [2, 2]).balanced_accuracy == 1


def test_errors_are_counted_by_class() -> None:
    evaluation = of([0, 0, 0, 2, 2], [0, 1, 2, 2, 0])
    errors, samples = evaluation.errors_by_class(4)
    assert errors.tolist() == [2, 0, 1, 0]
    assert samples.tolist() == [3, 0, 2, 0]
    assert errors.sum() == evaluation.errors
    with pytest.raises(DataError, match="the evaluation has label 2; expected 0 to 1"):
        evaluation.errors_by_class(2)


def test_counts_alone_are_an_evaluation() -> None:
    counts = Evaluation(3, 5)
    assert (counts.labels, counts.predictions, counts.confidence) == (None, None, None)
    assert counts.balanced_accuracy is None
    with pytest.raises(DataError, match=r"on 5 samples has no predictions, .* evaluate the model"):
        counts.errors_by_class(4)
    # arrays take no part in comparisons, nor in messages
    assert of([0, 0, 0, 2, 2], [0, 1, 2, 2, 0]) == counts
    assert repr(of([0], [1])) == "Evaluation(errors=1, samples=1)"


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda inputs: (inputs, inputs), "tuple"),
        (lambda inputs: inputs[:, 0], r"\(50,\)"),
        (lambda inputs: inputs[:3], r"\(3, 4\)"),
    ],
)
def test_an_output_that_holds_no_logits_is_told(
    model: Callable[[Tensor], object], shape: str, labels: npt.NDArray[np.int64]
) -> None:
    expected = f"the model returned {shape} for a batch of 50 of data; expected logits of shape "
    with pytest.raises(ModelError, match=expected + r"\(50, 4\)"):
        evaluate(model, source_of(labels, labels), CLASSES, CPU)


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

"""A multilayer perceptron on standardized columns."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from softcache.data.tables import TableSource, column_statistics
from softcache.models.build import build
from softcache.models.builtin import Standardize, standardize_columns
from softcache.models.weights import load_weights

MEAN, STD = torch.tensor([10.0, -1.0]), torch.tensor([2.0, 0.5])


def plain() -> nn.Sequential:
    """An mlp: for two columns, without statistics."""
    model = build("mlp:8", input_shape=(2,), classes=3)
    assert isinstance(model, nn.Sequential)
    return model


def student() -> nn.Sequential:
    """An mlp: for two columns with these statistics."""
    model = plain()
    standardize_columns(model, MEAN, STD)
    return model


def standardize(mean: torch.Tensor, std: torch.Tensor) -> Standardize:
    module = Standardize(len(mean))
    module.set_statistics(mean, std)
    return module


def test_columns_have_mean_zero_and_deviation_one() -> None:
    rows = torch.tensor([[12.0, -1.0], [10.0, 0.0]])
    assert standardize(MEAN, STD)(rows).tolist() == [[1, 0], [0, 2]]
    random = np.random.default_rng(0)
    inputs = random.normal([5, 1e4], [0.1, 300], (200, 2)).astype(np.float32)
    source = TableSource("t", inputs, np.zeros(200, np.int64))
    scaled = standardize(*column_statistics(source))(source.fetch(range(200))[0])
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0, correction=0), 1, atol=1e-4)


def test_nan_is_the_mean_and_infinity_stays() -> None:
    rows = torch.tensor([[math.nan, 0.0], [math.inf, math.nan]])
    assert standardize(MEAN, STD)(rows).tolist() == [[0, 2], [math.inf, 0]]


def test_a_deviation_of_zero_is_one() -> None:
    module = standardize(torch.tensor([3.0]), torch.tensor([0.0]))
    assert module(torch.tensor([[3.0], [5.0]])).tolist() == [[0], [2]]


def test_the_model_sees_standardized_rows_and_learns_only_weights() -> None:
    model = student()
    rows = torch.randn(4, 2)
    torch.testing.assert_close(model(rows), model[1:]((rows - MEAN) / STD))
    names = [name for name, _ in model.named_parameters()]
    assert names == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_without_statistics_columns_stay_as_they_are() -> None:
    model, rows = plain(), torch.randn(4, 2)
    assert torch.equal(model(rows), model[1:](rows))
    images = build("mlp:8", input_shape=(1, 2, 1), classes=3)
    assert not any(isinstance(module, Standardize) for module in images.modules())


def test_the_statistics_are_saved_with_the_weights(tmp_path: Path) -> None:
    saved = student()
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    loaded = build("mlp:8", input_shape=(2,), classes=3)
    load_weights(loaded, tmp_path / "w.safetensors")
    rows = torch.randn(4, 2)
    assert torch.equal(loaded(rows), saved(rows))
    assert loaded.state_dict()["0.column_mean"].tolist() == MEAN.tolist()


def test_weights_without_statistics_are_of_columns_as_they_are(tmp_path: Path) -> None:
    saved = build("mlp:8", input_shape=(2,), classes=3)
    state = {name: value for name, value in saved.state_dict().items() if "column" not in name}
    save_file(state, tmp_path / "old.safetensors")
    loaded = build("mlp:8", input_shape=(2,), classes=3)
    load_weights(loaded, tmp_path / "old.safetensors")
    rows = torch.randn(4, 2)
    assert torch.equal(loaded(rows), saved(rows))


def test_the_statistics_are_copies() -> None:
    mean = MEAN.clone()
    module = copy.deepcopy(standardize(mean, STD))
    mean += 1
    assert torch.equal(module.column_mean, MEAN)

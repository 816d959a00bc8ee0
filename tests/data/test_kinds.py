"""Evaluation data of another kind than the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from softcache.data.kinds import SAMPLES, check_same_kind
from softcache.data.source import ArraySource
from softcache.data.user_dataset import DatasetSource
from softcache.errors import DataError


def source(name: str, inputs: npt.NDArray[Any]) -> ArraySource:
    return ArraySource(name, inputs, np.zeros(len(inputs), np.int64))


IMAGES = np.full((3, 1, 4, 4), 200, np.uint8)


@pytest.mark.parametrize(
    ("data", "evaluation", "message"),
    [
        (IMAGES, IMAGES[:, :, :3], r"shape \(1, 3, 4\), those of the data \(1, 4, 4\)"),
        (IMAGES, IMAGES / 255, "its samples are float64, those of the data uint8"),
        (IMAGES / 255, IMAGES, "its samples are uint8, those of the data float64"),
        (IMAGES, IMAGES.astype(np.int64), "its samples are int64, those of the data uint8"),
        (
            IMAGES / 255,
            IMAGES / 1.0,
            "largest value is 200, that of the data 0.784314, in up to 256",
        ),
        (IMAGES / 1.0, IMAGES / 255, "largest value is 0.784314, that of the data 200"),
    ],
)
def test_what_differs_is_named_with_both_values(
    data: npt.NDArray[Any], evaluation: npt.NDArray[Any], message: str
) -> None:
    with pytest.raises(
        DataError, match=rf"^test is evaluation data of another kind than data: .*{message}"
    ):
        check_same_kind(source("data", data), source("test", evaluation))


@pytest.mark.parametrize(
    ("data", "evaluation"),
    [
        (IMAGES, IMAGES // 200),  # dark images, but integers have a scale of their own
        (IMAGES, IMAGES.astype(np.uint16)),
        (IMAGES / 255, (IMAGES / 200 * 1.4).astype(np.float32)),
        (IMAGES / 1.0, IMAGES * 3.0),
        (np.zeros((2, 5), np.int64), np.zeros((4, 9), np.int64)),  # texts
    ],
)
def test_what_is_of_one_kind_passes(data: npt.NDArray[Any], evaluation: npt.NDArray[Any]) -> None:
    check_same_kind(source("data", data), source("test", evaluation))


def test_the_shape_is_free_where_that_of_the_data_varies() -> None:
    def varied(first: int) -> list[npt.NDArray[Any]]:
        return [np.zeros((3, first + i, 5), np.uint8) for i in range(2)]

    def dataset(items: Any) -> DatasetSource:  # noqa: ANN401
        return DatasetSource("items", items, len(items))

    check_same_kind(dataset(varied(6)), dataset(varied(8)))
    with pytest.raises(DataError, match=r"shape \(3, 7, 5\), those of the data \(3, 6, 5\)"):
        check_same_kind(dataset(varied(6)[:1]), dataset(varied(6)))


def test_only_the_first_samples_are_read() -> None:
    inputs = np.zeros((SAMPLES + 1, 2))
    inputs[SAMPLES] = 100
    check_same_kind(source("data", inputs), source("test", np.zeros((1, 2))))
    inputs[SAMPLES - 1] = 100
    with pytest.raises(DataError, match="largest value is 0, that of the data 100"):
        check_same_kind(source("data", inputs), source("test", np.zeros((1, 2))))


def test_missing_values_have_no_scale() -> None:
    inputs = np.array([[np.nan, 0.5]])
    check_same_kind(source("data", inputs), source("test", np.array([[0.5, 1.0]])))
    with pytest.raises(DataError, match=r"largest value is 7, that of the data 0\.5"):
        check_same_kind(source("data", inputs), source("test", np.array([[np.nan, 7.0]])))

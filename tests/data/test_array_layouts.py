"""Arrays with channels last, without channels or in wide integers; labels and items of other forms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from softcache.data.keys import sample_keys
from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.source import UNLABELLED, Source
from softcache.data.user_dataset import DatasetSource
from softcache.errors import DataError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)  # (N, H, W, C)
IMAGES[0, 0, 0] = [0, 0, 255]
FIRST = IMAGES.transpose(0, 3, 1, 2)  # (N, C, H, W)
OPAQUE = np.concatenate([IMAGES, np.full((6, 5, 7, 1), 255, np.uint8)], 3)

Open = Callable[[npt.NDArray[Any]], Source]


@pytest.fixture(params=["npz", "dataset"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Arrays as a source of either kind."""

    def open_arrays(inputs: npt.NDArray[Any]) -> Source:
        if request.param == "dataset":
            return dataset(list(inputs))
        np.savez(tmp_path / "a.npz", x=inputs)
        return open_source(f"npz:{tmp_path / 'a.npz'}")

    return open_arrays


def dataset(items: Any) -> DatasetSource:  # noqa: ANN401  # anything with items
    return DatasetSource("items", items, len(items))


def values(source: Source) -> torch.Tensor:
    return source.fetch(range(len(source)))[0]


def keys(inputs: npt.NDArray[Any]) -> list[int]:
    return [int(key) for key in sample_keys(torch.from_numpy(np.ascontiguousarray(inputs)))]


# layouts
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.int64, np.int16])
def test_channels_last_are_turned_and_this_is_said(
    opened: Open, channels: int, dtype: type, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs: npt.NDArray[Any] = IMAGES[..., :channels].astype(dtype)
    result = values(opened(inputs))
    expected = np.uint8 if np.issubdtype(dtype, np.signedinteger) else dtype
    assert result.numpy().dtype == expected
    assert np.array_equal(result.numpy(), FIRST[:, :channels])
    assert keys(result.numpy()) == keys(FIRST[:, :channels].astype(expected))
    said = capsys.readouterr().out
    assert f"samples (5, 7, {channels}) are read as ({channels}, 5, 7): " in said
    assert said.count("channels are last and become the first axis") == 1


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 3), (2, 4, 8, 3), (2, 1, 8, 1), (2, 3, 8, 8), (2, 256, 4, 4), (2, 64, 1, 1),
              (2, 5, 8, 6), (2, 9, 3), (2, 7), (2, 5, 6, 7, 3)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_other_shapes_are_left_alone(
    opened: Open, shape: tuple[int, ...], dtype: type, capsys: pytest.CaptureFixture[str]
) -> None:
    if len(shape) == 3 and dtype == np.uint8:
        return  # grey images
    inputs: npt.NDArray[Any] = RANDOM.integers(0, 2, shape).astype(dtype)
    assert keys(values(opened(inputs)).numpy()) == keys(inputs)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_grey_images_get_an_axis_of_channels(
    opened: Open, dtype: type, capsys: pytest.CaptureFixture[str]
) -> None:
    result = values(opened(IMAGES[..., 2].astype(dtype)))
    assert result.dtype == torch.uint8
    assert np.array_equal(result.numpy(), FIRST[:, 2:])
    said = capsys.readouterr().out
    assert "samples (5, 7) are read as (1, 5, 7): " in said
    assert "they are grey and get an axis of channels" in said


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.int64, ">i8"])
def test_wide_integers_of_images_become_uint8(
    opened: Open, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = values(opened(FIRST.astype(dtype)))
    assert result.dtype == torch.uint8
    assert keys(result.numpy()) == keys(FIRST)
    assert "values of 0 to 255 become uint8" in capsys.readouterr().out


@pytest.mark.parametrize("value", [-1, 256])
def test_integers_beyond_an_image_keep_their_type(opened: Open, value: int) -> None:
    inputs = FIRST.astype(np.int64)
    inputs[0, 0, 0, 0] = value
    assert values(opened(inputs[:1])).dtype == torch.int64


def test_rows_of_integers_keep_their_type(opened: Open) -> None:
    rows = np.arange(12).reshape(3, 4)
    result = values(opened(rows))
    assert result.dtype == torch.int64
    assert keys(result.numpy()) == keys(rows)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_alpha_is_composited_on_white(
    opened: Open, dtype: type, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs: npt.NDArray[Any] = OPAQUE.astype(dtype)
    inputs[0, 0, 0, 3], inputs[0, 0, 1] = 0, [10, 10, 10, 51]
    result = values(opened(inputs)).numpy()
    assert result.dtype == (np.float32 if dtype == np.float32 else np.uint8)
    assert result[0, :, 0, 0].tolist() == [255, 255, 255]
    assert result[0, :, 0, 1].tolist() == pytest.approx([206, 206, 206])
    assert np.array_equal(result[1:], FIRST[1:])
    assert "alpha is composited on white" in capsys.readouterr().out


def test_alpha_of_floats_up_to_one_is_composited_on_one(opened: Open) -> None:
    inputs = OPAQUE.astype(np.float32) / 255
    inputs[0, 0, 0] = [0, 0, 0, 0.25]
    result = values(opened(inputs)).numpy()
    assert result[0, :, 0, 0].tolist() == [0.75, 0.75, 0.75]
    assert np.array_equal(result[1:], FIRST[1:].astype(np.float32) / 255)


def test_four_channels_of_other_numbers_are_no_alpha(
    opened: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = RANDOM.normal(size=(2, 5, 7, 4)).astype(np.float32)
    inputs[0] -= 1
    assert np.array_equal(values(opened(inputs)).numpy(), inputs.transpose(0, 3, 1, 2))
    assert "there is no alpha among the 4 channels" in capsys.readouterr().out


# later items of a Dataset
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([IMAGES[0], FIRST[0]], r"item 1 is uint8 of shape \(3, 5, 7\), which is another layout"),
        ([FIRST[0], IMAGES[0]], r"item 1 is uint8 of shape \(5, 7, 3\), which is another layout"),
        ([IMAGES[0], OPAQUE[0]], r"item 1 is uint8 of shape \(5, 7, 4\), which is another layout"),
        (
            [FIRST[0].astype(int), FIRST[0].astype(int) + 1],
            "item 1 holds int64 .* from 1 to 256, beyond",
        ),
        ([FIRST[0].astype(int), FIRST[0]], "item 1 holds uint8 with values"),
        (
            [OPAQUE[0] / 255, OPAQUE[0] / 1.0],
            "item 1 has values from 0 to 255, beyond an image's 0 to 1",
        ),
    ],
)
@pytest.mark.parametrize("indices", [[1], [0, 1]])
def test_a_later_item_that_does_not_fit_is_named(
    items: list[Any], message: str, indices: list[int]
) -> None:
    with pytest.raises(DataError, match=f"^items: {message}.*, unlike item 0, which decides"):
        dataset(items).fetch(indices)


def test_the_first_item_decides_also_in_worker_processes() -> None:
    source = dataset(list(IMAGES.astype(np.int64)))
    batches = loader(source, [[3], [1, 2]], workers=2)
    assert [batch.inputs.tolist() for batch in batches] == [
        FIRST[[3]].tolist(),
        FIRST[1:3].tolist(),
    ]


def test_pil_images_of_a_dataset_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "a").mkdir()
    images = [Image.fromarray(OPAQUE[0]), Image.fromarray(OPAQUE[1]).convert("P")]
    images += [Image.fromarray(IMAGES[2]), Image.fromarray(IMAGES[3])]
    paths = [tmp_path / "a" / f"{number}.png" for number in range(4)]
    for path, image in zip(paths, images, strict=True):
        image.save(path, exif=tags)
    folder = open_source(f"folder:{tmp_path}").fetch(range(4))[0]
    result = values(dataset([Image.open(path) for path in paths]))
    assert result.shape == (4, 3, 7, 5)
    assert torch.equal(result, folder)


def test_the_depth_of_pil_images_is_that_of_the_first() -> None:
    deep = [Image.fromarray(np.array([[value]], np.int32)) for value in (100_000, 1000, 100_000)]
    result = values(dataset(deep)).flatten().tolist()
    assert result == pytest.approx([value / (2**31 - 1) for value in (100_000, 1000, 100_000)])
    with pytest.raises(DataError, match=r"item 1 cannot be read as an image .*values up to 100000"):
        dataset(deep[1:]).fetch([1])


def test_a_pil_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(IMAGES[0]).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"items: item 0 cannot be read as an image \("):
        dataset([Image.open(path)]).fetch([0])


# labels
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, int])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_whole_numbers_of_any_type_are_labels(
    tmp_path: Path, dtype: type, shape: tuple[int, ...]
) -> None:
    np.savez(
        tmp_path / "a.npz", x=np.zeros((3, 2)), y=np.array([2, 0, 1]).reshape(shape).astype(dtype)
    )
    labels = open_source(f"npz:{tmp_path / 'a.npz'}").fetch(range(3))[1]
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1]


def test_nan_is_a_missing_label(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)), y=np.array([np.nan, 1]))
    assert open_source(f"npz:{tmp_path / 'a.npz'}").fetch([0, 1])[1].tolist() == [UNLABELLED, 1]


def test_a_label_between_two_numbers_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)), y=np.array([np.nan, 1.5]))
    with pytest.raises(
        DataError, match=r"labels are float64 and sample 1 has 1\.5; expected integers"
    ):
        open_source(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("label", "expected"),
    [(torch.tensor(2), 2), (torch.tensor(2.0), 2), (torch.tensor([2]), 2), (np.array(2.0), 2),
     (np.array([2]), 2), (np.float64(2), 2), (np.float32(2), 2), (2.0, 2), (True, 1),
     (float("nan"), UNLABELLED), (np.array(np.nan), UNLABELLED), (torch.tensor(float("nan")), UNLABELLED),
     (None, UNLABELLED)],
)  # fmt: skip
def test_one_number_of_any_type_is_a_label(label: object, expected: int) -> None:
    assert dataset([(np.zeros(3), label)]).fetch([0])[1].tolist() == [expected]


# items
@pytest.mark.parametrize("key", ["image", "img", "pixel_values", "input", "inputs", "x", "text"])
@pytest.mark.parametrize("label_key", ["label", "labels", "target", "y", "fine_label"])
def test_an_item_may_be_a_dict(key: str, label_key: str) -> None:
    inputs, labels = dataset([{"id": 9, key: FIRST[0], label_key: 3}]).fetch([0])
    assert keys(inputs.numpy()) == keys(FIRST[:1])
    assert labels.tolist() == [3]


def test_a_dict_without_a_label_is_unlabelled() -> None:
    assert dataset([{"image": Image.fromarray(IMAGES[0])}]).fetch([0])[1].tolist() == [UNLABELLED]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"x": 1, "label": 1, "y": 2},
            "items: item 0 has labels under label, y; expected one of them",
        ),
        ({"x": 1, "image": 1}, "items: item 0 has inputs under image, x; expected one of them"),
        (
            {"pixels": 1},
            "item 0 is dict, which is neither .*: it has pixels; expected .* image, img",
        ),
        ({"text": "cat", "label": 1}, "item 0 is dict, which is neither an input"),
    ],
)
def test_a_dict_that_is_no_sample_is_refused(item: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset([item]).fetch([0])


@pytest.mark.parametrize(
    ("item", "inputs", "label"),
    [
        ([np.ones(3), 4], [1, 1, 1], 4),
        ([[1.0, 2.0], 4], [1, 2], 4),
        ([torch.ones(3), torch.tensor(4)], [1, 1, 1], 4),
        ([torch.ones(3), None], [1, 1, 1], UNLABELLED),
        ([1.0, 2.0], [1, 2], UNLABELLED),
        ([[1.0, 2.0], [3.0, 4.0]], [[1, 2], [3, 4]], UNLABELLED),
        ([1.0, 2.0, 3.0], [1, 2, 3], UNLABELLED),
    ],
)
def test_a_list_of_two_is_a_pair_if_its_parts_differ(
    item: list[Any], inputs: list[Any], label: int
) -> None:
    result, labels = dataset([item]).fetch([0])
    assert result[0].tolist() == inputs
    assert labels.tolist() == [label]


def test_a_list_of_an_image_and_a_label_is_a_pair() -> None:
    inputs, labels = dataset([[Image.fromarray(IMAGES[0]), 2]]).fetch([0])
    assert keys(inputs.numpy()) == keys(FIRST[:1])
    assert labels.tolist() == [2]

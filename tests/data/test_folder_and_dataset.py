"""Image folders and the user's own Datasets, values and labels, and content keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from softcache.data.keys import sample_keys
from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.source import UNLABELLED, ArraySource, check_labels
from softcache.errors import DataError, SettingsError
from softcache.util.tensors import to_float
from tests.data.sources_cases import fetch

Pixels = npt.NDArray[np.uint8]

DATASETS = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

PIXELS = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)


class Items(Dataset):
    def __init__(self, items, classes=None):
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def tensors():
    return Items([(torch.from_numpy(p), i) for i, p in enumerate(PIXELS)])

def arrays():
    return Items([(p, np.int64(i)) for i, p in enumerate(PIXELS)])

def lists():
    return Items([(p.tolist(), torch.tensor(i)) for i, p in enumerate(PIXELS)])

def grey_images():
    return Items([(Image.fromarray(p), i) for i, p in enumerate(PIXELS)])

def colour_images():
    return Items([(Image.fromarray(p).convert("RGB"), i) for i, p in enumerate(PIXELS)])

def unlabelled():
    return Items([torch.from_numpy(p) for p in PIXELS])

def label_none():
    return Items([(p, None) for p in PIXELS])

def label_nan():
    return Items([(p, np.float32("nan")) for p in PIXELS])

def named():
    return Items([(PIXELS[0], 0)], classes=["cat", "dog"])

def counted():
    return Items([(PIXELS[0], 0)], classes=2)

def splits(split):
    return Items([(PIXELS[0], {"train": 0, "test": 1, "odd@name": 2}[split])])

def empty():
    return Items([])

def number():
    return 3

class Stream(IterableDataset):
    def __iter__(self):
        return iter(PIXELS)

def stream():
    return Stream()

def shapes():
    return Items([(torch.zeros(2, 3), 0), (torch.zeros(3, 2), 1)])

def dtypes():
    return Items([(torch.zeros(2, 3), 0), (torch.zeros(2, 3, dtype=torch.uint8), 1)])

def widths():
    return Items([(torch.zeros(2, 3), 0), (torch.zeros(2, 3, dtype=torch.float64), 1)])

def bfloat16():
    return Items([(torch.zeros(2, 3, dtype=torch.bfloat16), 0)])

def garbage(item):
    return lambda: Items([(PIXELS[0], 0), item])

text = garbage("cat")
nothing = garbage(None)
mapping = garbage({"pixels": 1})
triple = garbage((PIXELS[0], 0, 0))
ragged = garbage(([[1, 2], [3]], 0))
text_label = garbage((PIXELS[0], "cat"))
two_labels = garbage((PIXELS[0], torch.tensor([0.5, 1.0])))
infinite_label = garbage((PIXELS[0], float("inf")))
vast_label = garbage((PIXELS[0], 1 << 70))
half_label = garbage((PIXELS[0], 1.5))


class Failing(Items):
    def __getitem__(self, index):
        raise OSError("the share is gone") if index else KeyError("pixels")

def failing():
    return Failing([0, 1])

def fails_at_once():
    raise RuntimeError("no such corpus")
"""


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    path = tmp_path / "datasets.py"
    path.write_text(DATASETS)
    return path


def write_image(path: Path, pixels: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# folder
@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Splits train and test of grey images, with a text file among them."""
    root = tmp_path / "pets"
    for split, first in (("train", 0), ("test", 100)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(3):
                pixels = np.full((4, 5), first + 10 * label + number, np.uint8)
                write_image(root / split / name / f"{number}.png", pixels)
        (root / split / "cat" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize(("split", "first"), [("", 0), ("@train", 0), ("@test", 100)])
def test_a_folder_gives_its_images_class_by_class(
    image_folder: Path, split: str, first: int
) -> None:
    source = open_source(f"folder:{image_folder}{split}")
    inputs, labels = source.fetch(range(6))
    assert source.name == f"folder:pets{split or '@train'}"
    assert source.class_names == ("cat", "dog")
    assert inputs.shape == (6, 1, 4, 5)
    assert (inputs[:, 0, 0, 0] - first).tolist() == [0, 1, 2, 10, 11, 12]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.fetch([4])[1].tolist() == [1]


def test_a_folder_without_splits_is_its_own_train_split(image_folder: Path) -> None:
    alone = open_source(f"folder:{image_folder / 'test'}")
    assert torch.equal(alone.fetch(range(6))[0], fetch(f"folder:{image_folder}@test", range(6))[0])
    named = open_source(f"folder:{image_folder / 'train'}")
    assert named.name == "folder:pets@train"


def test_colour_images_have_their_channels_first(tmp_path: Path) -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    write_image(tmp_path / "a" / "0.png", pixels)
    assert torch.equal(fetch(f"folder:{tmp_path}")[0][0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_sixteen_bit_grey_keeps_its_values_or_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "0.png", np.array([[0, 255, 256, 65535]], np.uint16))
    try:
        inputs = fetch(f"folder:{tmp_path}")[0]
    except DataError:
        return
    assert len(set(inputs[0, 0, 0].tolist())) == 4


def test_images_of_different_sizes_are_named(image_folder: Path) -> None:
    write_image(image_folder / "train" / "dog" / "3.png", np.zeros((6, 5), np.uint8))
    source = open_source(f"folder:{image_folder}")
    with pytest.raises(
        DataError, match=r"dog/3\.png in .* \(1, 6, 5\), cat/1\.png has \(1, 4, 5\).*add \?size="
    ):
        source.fetch([1, 2, 6])


@pytest.mark.parametrize("split", ["", "@valid"])
def test_a_missing_folder_is_named(tmp_path: Path, split: str) -> None:
    with pytest.raises(
        DataError, match=r"folder:.*nowhere.*: no such folder; expected one sub-folder of images"
    ):
        open_source(f"folder:{tmp_path / 'nowhere'}{split}")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds no images; expected one sub-folder per class"):
        open_source(f"folder:{tmp_path}")


DAMAGED_IMAGES = {
    "text.png": b"hello",
    "empty.jpg": b"",
    "cut.bmp": b"BM" + bytes(30),
    "number.ppm": b"P6 4 x5 255\n" + bytes(60),
    "bomb.ppm": b"P6 100000 100000 255\n" + bytes(60),
}


@pytest.mark.parametrize("name", DAMAGED_IMAGES)
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / name).write_bytes(DAMAGED_IMAGES[name])
    with pytest.raises(DataError, match=rf"cat/{name} cannot be read as an image"):
        fetch(f"folder:{tmp_path}")


def test_a_cut_image_is_named(image_folder: Path) -> None:
    path = image_folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cat/0\.png cannot be read as an image"):
        fetch(f"folder:{image_folder}")


def test_without_pillow_the_extra_is_named(
    image_folder: Path, without: Callable[[str], None]
) -> None:
    without("PIL")
    with pytest.raises(
        SettingsError,
        match=r"needs PIL\.Image .*; pip install 'softcache\[vision\]' "
        r"\(or, in a clone, pip install -e '\.\[vision\]'\)",
    ):
        fetch(f"folder:{image_folder}")


# the user's own Dataset
PIXELS = np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists", "grey_images"])
def test_a_dataset_may_give_tensors_arrays_lists_or_images(datasets: Path, kind: str) -> None:
    source = open_source(f"{datasets}:{kind}")
    inputs, labels = source.fetch([3, 1])
    assert source.name == f"datasets.py:{kind}@train"
    assert len(source) == 4
    assert inputs.dtype == torch.uint8
    assert inputs.tolist() == PIXELS[[3, 1], None].tolist()  # grey images have one channel
    assert labels.tolist() == [3, 1]
    assert labels.dtype == np.int64


def test_colour_images_of_a_dataset_have_their_channels_first(datasets: Path) -> None:
    inputs = fetch(f"{datasets}:colour_images", range(4))[0]
    assert inputs.shape == (4, 3, 2, 3)
    assert all(np.array_equal(inputs[:, channel], PIXELS) for channel in range(3))


@pytest.mark.parametrize("kind", ["unlabelled", "label_none", "label_nan"])
def test_a_dataset_may_leave_labels_out(datasets: Path, kind: str) -> None:
    inputs, labels = fetch(f"{datasets}:{kind}", range(4))
    assert inputs[:, 0].tolist() == PIXELS.tolist()
    assert labels.tolist() == [UNLABELLED] * 4


def test_class_names_come_from_the_dataset(datasets: Path) -> None:
    assert open_source(f"{datasets}:named").class_names == ("cat", "dog")
    assert open_source(f"{datasets}:tensors").class_names == ()


def test_a_number_of_classes_is_not_their_names(datasets: Path) -> None:
    assert open_source(f"{datasets}:counted").class_names == ()


@pytest.mark.parametrize(("split", "label"), [("", 0), ("@train", 0), ("@test", 1)])
def test_a_callable_that_takes_a_split_is_given_it(datasets: Path, split: str, label: int) -> None:
    assert fetch(f"{datasets}:splits{split}")[1].tolist() == [label]


def test_a_callable_that_takes_no_split_has_none_but_train(datasets: Path) -> None:
    assert len(open_source(f"{datasets}:tensors@train")) == 4
    with pytest.raises(SettingsError, match=r"no argument 'split', so it has no split 'test'"):
        open_source(f"{datasets}:tensors@test")


@pytest.mark.parametrize(("kind", "given"), [("number", "int"), ("stream", "Stream")])
def test_what_is_no_map_style_dataset_is_refused(datasets: Path, kind: str, given: str) -> None:
    with pytest.raises(DataError, match=rf"returned {given}; expected a map-style Dataset"):
        open_source(f"{datasets}:{kind}")


def test_an_empty_dataset_is_refused(datasets: Path) -> None:
    with pytest.raises(DataError, match=r"datasets\.py:empty holds no samples"):
        open_source(f"{datasets}:empty")


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "nothing",
        "mapping",
        "triple",
        "ragged",
        "text_label",
        "two_labels",
        "infinite_label",
        "vast_label",
        "half_label",
    ],
)
def test_an_item_that_is_no_sample_is_named(datasets: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"datasets\.py:.*: item 1 is \w+, which is neither"):
        fetch(f"{datasets}:{kind}", [0, 1])


def test_items_of_different_shapes_are_refused(datasets: Path) -> None:
    expected = (
        r"datasets\.py:shapes@train: inputs of one batch have different shapes or dtypes, "
        r"\[\('torch\.float32', \(2, 3\)\), \('torch\.float32', \(3, 2\)\)\]; the Dataset must"
    )
    with pytest.raises(DataError, match=expected):
        fetch(f"{datasets}:shapes", [0, 1])


def test_items_of_different_types_are_refused(datasets: Path) -> None:
    expected = r"item 1 is uint8 of shape \(2, 3\), which is another layout, unlike item 0"
    with pytest.raises(DataError, match=expected):
        fetch(f"{datasets}:dtypes", [0, 1])
    with pytest.raises(DataError, match=r"dtypes, \[\('torch\.float32', .*\('torch\.float64', "):
        fetch(f"{datasets}:widths", [0, 1])


def test_a_type_that_has_no_key_is_refused_or_keyed(datasets: Path) -> None:
    source = open_source(f"{datasets}:bfloat16")
    try:
        next(iter(loader(source, [[0]], keys=True)))
    except DataError as error:
        assert "bfloat16" in str(error)  # noqa: PT017  # either outcome is right


@pytest.mark.parametrize(("index", "cause"), [(0, "KeyError"), (1, "the share is gone")])
def test_a_dataset_that_raises_is_named_with_the_sample(
    datasets: Path, index: int, cause: str
) -> None:
    with pytest.raises(DataError, match=rf"datasets\.py:failing.* {index} .*{cause}"):
        fetch(f"{datasets}:failing", [index])


def test_a_callable_that_raises_is_named(datasets: Path) -> None:
    expected = (
        r"data .*datasets\.py:fails_at_once: the callable raised RuntimeError: no such corpus; it"
    )
    with pytest.raises(SettingsError, match=expected):
        open_source(f"{datasets}:fails_at_once")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no such file: .*nowhere\.py; expected FILE\.py:CALL"):
        open_source(f"{tmp_path / 'nowhere.py'}:data")


# values and labels
def test_unsigned_images_become_floats_up_to_one() -> None:
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [0, 0.2, 1]
    )
    assert to_float(torch.tensor([0, 13107, 65535], dtype=torch.uint16)).tolist() == pytest.approx(
        [0, 0.2, 1]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_become_float32_and_keep_their_values(dtype: torch.dtype) -> None:
    floats = to_float(torch.tensor([-2.5, 300.0], dtype=dtype))
    assert floats.dtype == torch.float32
    assert floats.tolist() == [-2.5, 300.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_stay_as_they_are(dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 40_000], dtype=dtype)
    assert to_float(ids) is ids


def test_labels_of_the_classes_and_unlabelled_pass() -> None:
    source = ArraySource("tiny", np.zeros((3, 2)), np.zeros(3, np.int64))
    check_labels(np.array([0, UNLABELLED, 4]), np.arange(3), 5, source)


@pytest.mark.parametrize("label", [5, -2, 1 << 40])
def test_a_label_out_of_range_is_named_with_its_sample(label: int) -> None:
    source = ArraySource("tiny", np.zeros((3, 2)), np.zeros(3, np.int64))
    with pytest.raises(DataError, match=rf"tiny: sample 72 has label {label}; expected 0 to 4, or"):
        check_labels(np.array([0, label, 9]), np.array([71, 72, 73]), 5, source)


# keys
def key(values: npt.NDArray[Any]) -> int:
    return int(sample_keys(torch.from_numpy(values)[None])[0])


def test_keys_are_as_the_format_says() -> None:
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(1, 28, 28)
    seed = xxhash.xxh3_64_intdigest(b"|u1(1, 28, 28)")
    assert key(pixels) == xxhash.xxh3_64_intdigest(pixels.tobytes(), seed)
    floats = np.linspace(0, 1, 6, dtype=np.float32)
    seed = xxhash.xxh3_64_intdigest(b"<f4(6,)")
    assert key(floats) == xxhash.xxh3_64_intdigest(floats.tobytes(), seed)


# no deadline: nothing here is timed
quick = settings(deadline=None, max_examples=50)
batches_of_images = hnp.arrays(np.uint8, st.tuples(st.integers(1, 8), st.just(2), st.just(3)))


@quick
@given(images=batches_of_images, seed=st.integers(0, 99))
def test_a_key_is_the_samples_own_whatever_its_company_and_place(images: Pixels, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(images))
    alone = [key(image) for image in images]
    assert sample_keys(torch.from_numpy(images[order])).tolist() == [alone[i] for i in order]


@quick
@given(images=batches_of_images)
def test_keys_are_equal_where_the_content_is_and_nowhere_else(images: Pixels) -> None:
    keys = sample_keys(torch.from_numpy(images))
    for image_key, image in zip(keys, images, strict=True):
        same = (images == image).all(axis=(1, 2))
        assert np.array_equal(keys == image_key, same)


@quick
@given(images=batches_of_images, bit=st.integers(0, 2 * 3 * 8 - 1))
def test_one_bit_changes_the_key(images: Pixels, bit: int) -> None:
    changed = images[0].copy()
    changed.reshape(-1)[bit // 8] ^= 1 << bit % 8
    assert key(changed) != key(images[0])


def test_type_and_shape_are_part_of_the_key() -> None:
    zeros: list[npt.NDArray[Any]] = [
        np.zeros((4, 6), np.uint8),
        np.zeros((6, 4), np.uint8),
        np.zeros(24, np.uint8),
        np.zeros((1, 4, 6), np.uint8),
        np.zeros((4, 6), np.int8),
        np.zeros((4, 3), np.uint16),
        np.zeros((4, 3), np.float16),
        np.zeros((2, 3), np.float32),
        np.zeros((2, 3), np.int32),
    ]
    assert len({values.nbytes for values in zeros}) == 1  # the bytes alone do not tell them apart
    assert len({key(values) for values in zeros}) == len(zeros)


def test_the_layout_in_memory_is_no_part_of_the_key() -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert channels_last.stride() != images.stride()
    assert np.array_equal(sample_keys(channels_last), sample_keys(images))
    assert np.array_equal(sample_keys(images.flip(0).flip(0)), sample_keys(images))

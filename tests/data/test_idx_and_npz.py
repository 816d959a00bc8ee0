"""IDX and npz files: what is opened, and what is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from softcache.data.open import open_source
from softcache.data.source import UNLABELLED
from softcache.errors import DataError, SettingsError
from tests.conftest import make_arrays
from tests.data.sources_cases import fetch


def write_idx(path: Path, values: npt.NDArray[Any], kind: int = 0x08) -> Path:
    raw = struct.pack(f">HBB{values.ndim}I", 0, kind, values.ndim, *values.shape)
    raw += values.astype(values.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """The train split plain, the test split gzipped; every pixel of a sample holds its number."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for stem, suffix, first in (("train", "", 0), ("t10k", ".gz", 100)):
        images = np.full((6, 4, 5), first, np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None]
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", np.arange(6, dtype=np.uint8))
    return folder


# specifications
@pytest.mark.parametrize("spec", ["mnist", "idx:", "", "@test"])
def test_what_has_no_form_is_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(SettingsError, match=r"is not a data specification; expected idx:DIR, npz:"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["tsv:table.tsv", "https://example.org/x", "torch.nn:Linear"])
def test_an_unknown_kind_is_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(SettingsError, match=r"of unknown kind '.+'; expected idx:DIR, npz:FILE"):
        open_source(spec)


# idx
@pytest.mark.parametrize(
    ("split", "named", "first"), [("", "train", 0), ("@train", "train", 0), ("@test", "test", 100)]
)
def test_idx_files_plain_and_gzipped_give_grey_images_and_labels(
    idx_folder: Path, split: str, named: str, first: int
) -> None:
    source = open_source(f"idx:{idx_folder}{split}")
    inputs, labels = source.fetch([2, 0])
    assert len(source) == 6
    assert source.name == f"idx:digits@{named}"  # without folders: it is written into shared files
    assert inputs.dtype == torch.uint8
    assert inputs.shape == (2, 1, 4, 5)
    assert inputs[:, 0, 0, 0].tolist() == [first + 2, first]
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0]


def test_idx_values_of_several_bytes_are_big_endian(idx_folder: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2) / 3
    write_idx(idx_folder / "train-images-idx3-ubyte", values, kind=0x0D)
    assert torch.equal(fetch(f"idx:{idx_folder}", range(6))[0], torch.from_numpy(values))


def test_idx_knows_two_splits(idx_folder: Path) -> None:
    with pytest.raises(SettingsError, match="@valid: no such split; expected @train or @test"):
        open_source(f"idx:{idx_folder}@valid")


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_missing_idx_file_is_named_with_its_folder(idx_folder: Path, name: str) -> None:
    (idx_folder / name).unlink()
    with pytest.raises(DataError, match=rf"no file {name} or {name}\.gz in .*digits"):
        open_source(f"idx:{idx_folder}")


def test_a_missing_idx_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file train-images-idx3-ubyte .* in .*nowhere"):
        open_source(f"idx:{tmp_path / 'nowhere'}")


IMAGES = struct.pack(">HBB3I", 0, 0x08, 3, 6, 4, 5) + bytes(120)
DAMAGED_IDX = {
    "empty": b"",
    "three bytes": IMAGES[:3],
    "cut in its sizes": IMAGES[:9],
    "cut in its values": IMAGES[:-1],
    "a byte too many": IMAGES + b"\0",
    "sizes beyond any memory": IMAGES[:4] + b"\xff" * 12 + IMAGES[16:],
}


@pytest.mark.parametrize("raw", DAMAGED_IDX.values(), ids=DAMAGED_IDX)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_idx_file_is_named(idx_folder: Path, raw: bytes, suffix: str) -> None:
    plain = idx_folder / "train-images-idx3-ubyte"
    plain.unlink()
    path = plain.with_name(plain.name + suffix)
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(DataError, match=rf"{path.name} is damaged .*; download it again"):
        open_source(f"idx:{idx_folder}")


@pytest.mark.parametrize(
    "raw",
    [
        b"\0\0\x07\x03" + IMAGES[4:],
        b"\1\0\x08\x03" + IMAGES[4:],
        b"\x89PNG" + bytes(40),
    ],
    ids=["unknown type", "no zero bytes", "an image"],
)
def test_a_file_that_is_no_idx_file_is_named_with_its_first_bytes(
    idx_folder: Path, raw: bytes
) -> None:
    (idx_folder / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(
        DataError, match=rf"idx3-ubyte begins with {raw[:4].hex()}; it is not an IDX"
    ):
        open_source(f"idx:{idx_folder}")


def damage_gzip(raw: bytes, how: str) -> bytes:
    damaged = bytearray(raw)
    if how == "cut":
        return raw[:-12]
    if how == "not gzip":
        return b"hello" * 10
    offset = {"checksum": len(raw) - 8, "values": 10}[how]  # 10: the first byte after gzip's header
    damaged[offset] ^= 0xFF
    return bytes(damaged)


@pytest.mark.parametrize(
    "how",
    ["cut", "not gzip", "checksum", "values"],
)
def test_damaged_gzip_is_named(idx_folder: Path, how: str) -> None:
    path = idx_folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage_gzip(path.read_bytes(), how))
    with pytest.raises(DataError, match=rf"{path.name} is damaged .*; download it again"):
        open_source(f"idx:{idx_folder}@test")


def test_idx_files_of_different_lengths_are_refused(idx_folder: Path) -> None:
    write_idx(idx_folder / "train-labels-idx1-ubyte", np.arange(5, dtype=np.uint8))
    with pytest.raises(DataError, match=r"labels are .* of shape \(5,\); expected .* shape \(6,\)"):
        open_source(f"idx:{idx_folder}")


def test_data_without_samples_are_refused(idx_folder: Path) -> None:
    write_idx(idx_folder / "train-images-idx3-ubyte", np.empty((0, 4, 5), np.uint8))
    write_idx(idx_folder / "train-labels-idx1-ubyte", np.empty(0, np.uint8))
    with pytest.raises(DataError, match="holds no samples; expected at least one"):
        open_source(f"idx:{idx_folder}")


# npz
def test_npz_gives_its_splits(data_file: Path) -> None:
    for split, seed, samples in (("train", 0, 300), ("test", 1, 100)):
        x, y = make_arrays(samples, seed)
        source = open_source(f"npz:{data_file}@{split}")
        inputs, labels = source.fetch(range(samples))
        assert source.name == f"npz:tiny.npz@{split}"
        assert np.array_equal(inputs.numpy(), x)
        assert np.array_equal(labels, y)
    assert open_source(f"npz:{data_file}").name == "npz:tiny.npz@train"


def test_npz_with_plain_names_is_the_train_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), y=np.array([[0], [1], [2]]))
    for spec in ("npz:a.npz", "npz:a.npz@train"):
        source = open_source(spec.replace("a.npz", str(tmp_path / "a.npz")))
        assert source.fetch([2])[1].tolist() == [2]  # labels (N, 1) are read as (N,)
    with pytest.raises(DataError, match=r"\['x', 'y'\]; expected x_test and y_test$"):
        open_source(f"npz:{tmp_path / 'a.npz'}@test")


def test_npz_without_labels_is_unlabelled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)))
    assert fetch(f"npz:{tmp_path / 'a.npz'}", [0, 2])[1].tolist() == [UNLABELLED, UNLABELLED]


def test_npz_names_what_it_holds_when_the_names_are_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"holds \['images'\]; expected x_train .*, or x and y"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


def test_a_folder_name_with_an_at_sign_needs_an_explicit_split(tmp_path: Path) -> None:
    (tmp_path / "me@host").mkdir()
    np.savez(tmp_path / "me@host" / "a.npz", x=np.zeros((3, 2)))
    assert len(open_source(f"npz:{tmp_path}/me@host/a.npz@train")) == 3


def test_unsigned_integers_too_wide_for_torch_become_int64(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((1, 2), 4_000_000_000, np.uint32))
    inputs = fetch(f"npz:{tmp_path / 'a.npz'}")[0]
    assert inputs.dtype == torch.int64
    assert inputs[0, 0] == 4_000_000_000


@pytest.mark.parametrize("dtype", [">f4", ">u2", ">i8", np.longdouble])
def test_numbers_of_any_width_and_byte_order_are_read(tmp_path: Path, dtype: str) -> None:
    values = np.arange(6).reshape(3, 2)
    np.savez(tmp_path / "a.npz", x=values.astype(dtype))
    assert fetch(f"npz:{tmp_path / 'a.npz'}", range(3))[0].tolist() == values.tolist()


@pytest.mark.parametrize(
    "x", [np.zeros((3, 2), bool), np.zeros(3), np.zeros((3, 2), complex), np.array([["a", "b"]])]
)
def test_inputs_that_are_no_numbers_by_sample_are_refused(
    tmp_path: Path, x: npt.NDArray[Any]
) -> None:
    np.savez(tmp_path / "a.npz", x=x)
    with pytest.raises(DataError, match=rf"a.npz@train: inputs are {x.dtype} .* expected numbers"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    "y",
    [
        np.zeros(2, int),
        np.array([0, 0.5, 1]),
        np.array([0, np.inf, 1]),
        np.array([0, 1e19, 1]),
        np.full((3, 2), 2),
        np.array(1),
    ],
)
def test_labels_that_are_not_a_whole_number_for_each_input_are_refused(
    tmp_path: Path, y: npt.NDArray[Any]
) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), y=y)
    with pytest.raises(
        DataError, match=rf"labels are {y.dtype} .*expected integers .*shape \(3,\)"
    ):
        open_source(f"npz:{tmp_path / 'a.npz'}")


def test_no_such_npz_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"npz:.*nowhere\.npz: no such file"):
        open_source(f"npz:{tmp_path / 'nowhere.npz'}")


@pytest.mark.parametrize("raw", [b"", b"hello", b"PK\x03\x04" + bytes(40)])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"npz:.*a\.npz cannot be read as arrays"):
        open_source(f"npz:{tmp_path / 'a.npz'}")


def test_objects_in_an_npz_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[{}, None]], dtype=object))
    with pytest.raises(
        DataError,
        match=r"has an array of Python objects, which softcache never loads; .*y\.astype\(str\)",
    ):
        open_source(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (np.array(["dog", "cat", "dog"]), [1, 0, 1], ("cat", "dog")),
        (np.array([b"dog", b"cat", b"ant"]), [2, 1, 0], ("ant", "cat", "dog")),
        (np.array([True, False, True]), [1, 0, 1], ()),
        (np.array([[0, 1], [1, 0], [0, 1]]), [1, 0, 1], ()),
        (np.eye(3, dtype=np.float32)[[2, 0, 1]], [2, 0, 1], ()),
    ],
)
def test_labels_may_be_words_booleans_or_one_hot(
    tmp_path: Path, labels: np.ndarray, expected: list[int], names: tuple[str, ...]
) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2), np.float32), y=labels)
    source = open_source(f"npz:{tmp_path / 'a.npz'}")
    assert source.fetch(range(3))[1].tolist() == expected
    assert source.class_names == names


def test_words_of_an_npz_take_the_order_of_the_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), y=np.array(["dog", "cat", "dog"]))
    source = open_source(f"npz:{tmp_path / 'a.npz'}?classes=dog,ant,cat")
    assert source.fetch(range(3))[1].tolist() == [0, 2, 0]
    assert source.class_names == ("dog", "ant", "cat")
    with pytest.raises(DataError, match=r"classes names dog, ant, and the labels are cat, dog"):
        open_source(f"npz:{tmp_path / 'a.npz'}?classes=dog,ant")


@pytest.mark.parametrize("labels", [np.eye(3)[:, :2] * 2, np.array([[0.5, 0.5]] * 3)])
def test_rows_of_other_numbers_are_no_labels(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), y=labels)
    with pytest.raises(
        DataError, match=r"labels are float64 of shape \(3, 2\); expected integers or words"
    ):
        open_source(f"npz:{tmp_path / 'a.npz'}")


def test_an_npy_file_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"npz:.*a\.npy "):
        open_source(f"npz:{tmp_path / 'a.npy'}")


def test_no_damage_to_an_npz_escapes_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((1000, 10)), y=np.zeros(1000, int))
    raw = path.read_bytes()
    refused = 0
    for offset in range(0, len(raw), 10):
        path.write_bytes(raw[:offset] + bytes([raw[offset] ^ 0xFF]) + raw[offset + 1 :])
        try:
            open_source(f"npz:{path}")
        except DataError:
            refused += 1
    assert refused > 20  # most bytes matter; a few are zip's dates and flags

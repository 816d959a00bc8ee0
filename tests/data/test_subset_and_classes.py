"""Options of every kind of data: names of classes, a random order, the first samples."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.subset import SubsetSource
from softcache.errors import DataError, SettingsError
from tests.data.test_idx_and_npz import write_idx

SAMPLES = 8
DATASET = """
import numpy as np

class Items:
    classes = ["first", "second"]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.full((1, 2, 2), index, np.uint8), index % 2

def make(split):
    return Items()
"""


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Specifications by kind; the first value of a sample is its number, its label that modulo 2."""
    images = np.arange(SAMPLES, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    labels = np.arange(SAMPLES) % 2
    np.savez(tmp_path / "a.npz", x=images[:, None], y=labels)
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "idx" / "train-labels-idx1-ubyte", labels.astype(np.uint8))
    (tmp_path / "a.py").write_text(DATASET)
    rows = "\n".join(f"{number},{number % 2}" for number in range(SAMPLES))
    (tmp_path / "a.csv").write_text(f"x,label\n{rows}\n")
    for number, image in enumerate(images):
        folder = tmp_path / "pets" / "ab"[number // 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    return {
        "npz": f"npz:{tmp_path / 'a.npz'}",
        "idx": f"idx:{tmp_path / 'idx'}",
        "code": f"{tmp_path / 'a.py'}:make",
        "csv": f"csv:{tmp_path / 'a.csv'}",
        "folder": f"folder:{tmp_path / 'pets'}",
    }


KINDS = ("npz", "idx", "code", "csv", "folder")


def numbers(spec: str) -> list[int]:
    source = open_source(spec)
    inputs = source.fetch(range(len(source)))[0]
    return [int(number) for number in inputs.reshape(len(source), -1)[:, 0]]


# classes
@pytest.mark.parametrize(
    ("kind", "name"),
    [("npz", "npz:a.npz?classes=cat,dog@train"), ("idx", "idx:idx?classes=cat,dog@train"),
     ("code", "a.py:make?classes=cat,dog@train"), ("csv", "csv:a.csv?classes=cat,dog")],
)  # fmt: skip
def test_classes_name_the_labels(data: dict[str, str], kind: str, name: str) -> None:
    source = open_source(f"{data[kind]}?classes=cat,dog")
    assert source.class_names == ("cat", "dog")
    assert source.name == name
    plain = open_source(data[kind])
    assert plain.fetch(range(SAMPLES))[1].tolist() == source.fetch(range(SAMPLES))[1].tolist()


def test_code_takes_options_before_its_split(data: dict[str, str]) -> None:
    source = open_source(f"{data['code']}?classes=cat,dog&samples=2@test")
    assert source.name == "a.py:make?classes=cat,dog&samples=2@test"
    assert open_source(data["code"]).name == "a.py:make@train"
    with pytest.raises(
        SettingsError, match=r"unknown option 'size'; expected classes, shuffle, samples"
    ):
        open_source(f"{data['code']}?size=3")


@pytest.mark.parametrize("kind", ["npz", "idx"])
def test_a_label_without_a_name_is_refused(data: dict[str, str], kind: str) -> None:
    with pytest.raises(DataError, match=r"classes names 1 classes, cat, and the data has label 1"):
        open_source(f"{data[kind]}?classes=cat")


@pytest.mark.parametrize(
    ("query", "message"),
    [("classes=cat,cat", "classes has 'cat' twice; expected different names in the order"),
     ("classes=cat,", "classes has an empty name"),
     ("classes=", "classes has an empty name")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["npz", "code", "folder"])
def test_names_must_be_different(data: dict[str, str], kind: str, query: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        open_source(f"{data[kind]}?{query}")


# shuffle and samples
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_samples_of_a_random_order_are_taken(data: dict[str, str], kind: str) -> None:
    order = np.random.default_rng(7).permutation(SAMPLES).tolist()
    assert order != sorted(order)
    assert numbers(f"{data[kind]}?samples=3") == [0, 1, 2]
    assert numbers(f"{data[kind]}?shuffle=7") == order
    spec = f"{data[kind]}?shuffle=7&samples=3"
    assert numbers(spec) == order[:3]
    source = open_source(spec)
    assert len(source) == 3
    assert "?samples=3&shuffle=7" in source.name
    assert source.class_names == open_source(data[kind]).class_names
    whole = open_source(data[kind]).fetch(order[:3])[1]
    assert source.fetch([0, 1, 2])[1].tolist() == whole.tolist()


def test_a_subset_of_a_folder_knows_its_labels_and_goes_to_workers(data: dict[str, str]) -> None:
    source = open_source(f"{data['folder']}?shuffle=7")
    assert isinstance(source, SubsetSource)
    order = np.random.default_rng(7).permutation(SAMPLES)
    assert source.labels is not None
    assert source.labels.tolist() == (order // 4).tolist()
    assert not source.text
    copied = pickle.loads(pickle.dumps(source))
    batches = loader(copied, [[0, 1], [7]], workers=1)
    values = [batch.inputs[:, 0, 0, 0].tolist() for batch in batches]
    assert values == [order[:2].tolist(), [order[7]]]
    assert getattr(open_source(f"{data['code']}?samples=2"), "labels", None) is None


def test_a_subset_of_a_table_keeps_its_columns(data: dict[str, str]) -> None:
    assert getattr(open_source(f"{data['csv']}?samples=2"), "columns", None) == ("x",)


def test_a_subset_of_texts_stays_one_of_texts(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "label": [0, 1, 0]})
    table.save_to_disk(str(tmp_path / "t"))
    source = open_source(f"hfds:{tmp_path / 't'}?samples=2")
    assert source.name == "hfds:t?samples=2@train"
    assert getattr(source, "text", None) is True
    assert source.fetch([1])[1].tolist() == [1]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [("samples=9", DataError, "samples=9, and the data holds 8; expected at most as many"),
     ("samples=0", SettingsError, "samples '0'; expected a whole number from 1"),
     ("samples=1e3", SettingsError, "samples '1e3'; expected a whole number from 1"),
     ("shuffle=-1", SettingsError, "shuffle '-1'; expected a seed, a whole number from 0"),
     ("shuffle=", SettingsError, "shuffle ''; expected a seed, a whole number from 0")],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_out_of_range_are_refused(
    data: dict[str, str], kind: str, query: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_source(f"{data[kind]}?{query}")

"""Hugging Face data sets: columns, splits, labels and what they refuse."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from softcache.data.keys import sample_keys
from softcache.data.open import open_source
from softcache.data.text import decode
from softcache.errors import DataError, SettingsError
from tests.hub import BREEDS, save_pets, save_reviews


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pets(tmp_path_factory.mktemp("data") / "pets", train=12, test=4)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reviews(tmp_path_factory.mktemp("data") / "reviews", train=12, test=4)


def saved(folder: Path, **columns: Any) -> str:
    """Save a data set with these columns; returns its specification."""
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return f"hfds:{folder}"


def test_images_of_a_saved_folder_have_labels_and_names(pets: Path) -> None:
    source = open_source(f"hfds:{pets}?size=24")
    inputs, labels = source.fetch([3, 0])
    assert inputs.shape == (2, 3, 24, 24)
    assert inputs.dtype == torch.uint8
    rows = datasets.load_from_disk(str(pets))["train"]
    assert labels.tolist() == [rows[3]["label"], rows[0]["label"]]
    assert source.class_names == BREEDS
    assert source.name == "hfds:pets?size=24@train"
    assert len(open_source(f"hfds:{pets}?size=24@test")) == 4


def test_images_of_different_sizes_are_named(pets: Path) -> None:
    with pytest.raises(
        DataError, match=r"sample \d+ in hfds:pets@train has shape .*; sample 0|add \?"
    ):
        open_source(f"hfds:{pets}").fetch(range(12))


def test_texts_are_code_points_of_the_longest(reviews: Path) -> None:
    source = open_source(f"hfds:{reviews}")
    texts = datasets.load_from_disk(str(reviews))["train"]["text"]
    inputs = source.fetch(range(12))[0]
    assert inputs.shape == (12, max(map(len, texts)))
    assert decode(inputs) == list(texts)
    short = open_source(f"hfds:{reviews}?length=7").fetch(range(12))[0]
    assert decode(short) == [text[:7].rstrip("\0") for text in texts]


def test_texts_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = saved(tmp_path / "t", text=["☕" * 9, "12345", "123456", ""], label=[0, 1, 0, 1])
    open_source(f"{spec}?length=5")
    assert (
        "2 of 4 texts are longer than 5 characters and are cut; the longest has 9 (?length=9 cuts none)"
        in capsys.readouterr().out
    )
    for whole in (spec, f"{spec}?length=9"):
        source = open_source(whole)
        assert source.fetch([0])[0].shape == (1, 9)
        assert "cut" not in capsys.readouterr().out


def test_columns_of_numbers_are_inputs(tmp_path: Path) -> None:
    values = np.arange(12.0).reshape(4, 3)
    spec = saved(tmp_path / "n", x=values.tolist(), y=["b", "a", None, "b"])
    source = open_source(f"{spec}?input=x&label=y")
    inputs, labels = source.fetch(range(4))
    np.testing.assert_array_equal(inputs.numpy(), values)
    assert labels.tolist() == [1, 0, -1, 1]
    assert source.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("split", "samples"),
    [("train[:5]", 5), ("train[50%:]", 6), ("test[-1:]", 1), ("test", 4)],
)
def test_splits_are_cut_as_the_library_cuts_them(pets: Path, split: str, samples: int) -> None:
    source = open_source(f"hfds:{pets}?size=8@{split}")
    assert len(source) == samples
    assert source.name.endswith(f"@{split}")


def test_a_parquet_file_is_a_data_set(reviews: Path, tmp_path: Path) -> None:
    datasets.load_from_disk(str(reviews))["train"].to_parquet(str(tmp_path / "r.parquet"))
    source = open_source(f"hfds:{tmp_path / 'r.parquet'}?length=9@train[:3]")
    assert len(source) == 3
    whole = open_source(f"hfds:{reviews}?length=9").fetch(range(3))
    assert torch.equal(source.fetch(range(3))[0], whole[0])
    assert source.class_names == ("bad", "good")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_has_the_key_that_it_has_in_a_folder(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "images" / "cat" / "0.jpg"
    file.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(file, exif=exif)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for name, image in (("path", str(file)), ("bytes", {"bytes": file.read_bytes(), "path": None})):
        table = datasets.Dataset.from_dict({"image": [image], "label": [0]}, features=features)
        table.save_to_disk(str(tmp_path / name))
        for query in ("", "?size=16", "?size=12x18"):
            folder, hub = f"folder:{tmp_path / 'images'}{query}", f"hfds:{tmp_path / name}{query}"
            inputs = [open_source(spec).fetch([0])[0] for spec in (folder, hub)]
            assert sample_keys(inputs[0]).tolist() == sample_keys(inputs[1]).tolist()
            if not query:
                assert inputs[1].shape[2:] == ((20, 30) if orientation < 5 else (30, 20))


def test_an_image_that_cannot_be_converted_is_named(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"hfds:{pets}?size=8")

    def refuse(image: object, pixels: object) -> None:
        raise DataError("its mode is odd; save it as RGB")

    monkeypatch.setattr("softcache.data.huggingface.as_array", refuse)
    with pytest.raises(DataError, match=r"@train: sample 3 cannot be read: its mode is odd; save"):
        source.fetch([3, 1])


# classes


def named(folder: Path, labels: list[int | None]) -> str:
    names = datasets.ClassLabel(names=["neg", "neutral", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": [str(label) for label in labels], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return f"hfds:{folder}"


def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    spec = named(tmp_path / "x", [0, 1, 2, None, 2])
    source = open_source(f"{spec}?classes=pos,neg,neutral")
    assert source.class_names == ("pos", "neg", "neutral")
    assert source.fetch(range(5))[1].tolist() == [1, 2, 0, -1, 0]
    assert open_source(spec).fetch(range(5))[1].tolist() == [0, 1, 2, -1, 2]


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ("pos,neg", "leaves out 'neutral'"),
        ("pos,neg,neutral,other", "has 'other', which is not one of them"),
        ("positive,negative,neutral", "has 'positive', which is not one of them"),
    ],
)
def test_other_classes_are_refused(tmp_path: Path, classes: str, problem: str) -> None:
    spec = named(tmp_path / "x", [0, 1, 2])
    with pytest.raises(
        SettingsError,
        match=f"'label' has the classes neg, neutral, pos; classes={classes} {problem}; expected all",
    ):
        open_source(f"{spec}?classes={classes}")


def test_gaps_in_labels_are_unlabelled(tmp_path: Path) -> None:
    spec = saved(tmp_path / "x", text=["a", "b", "c"], label=[1.0, None, 0.0])
    assert open_source(spec).fetch(range(3))[1].tolist() == [1, -1, 0]
    spec = saved(tmp_path / "y", text=["a", "b", "c"], label=["no", "", "yes"])
    source = open_source(spec)
    assert (source.fetch(range(3))[1].tolist(), source.class_names) == ([0, -1, 1], ("no", "yes"))


def test_a_source_goes_to_another_process(pets: Path) -> None:
    source = open_source(f"hfds:{pets}?size=8")
    unpickled = pickle.loads(pickle.dumps(source))
    assert torch.equal(unpickled.fetch([1])[0], source.fetch([1])[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("?input=picture", "has no column 'picture'; it has image, label"),
        ("?label=kind", "has no column 'kind'; it has image, label"),
        ("?input=label", r"column 'label' holds ClassLabel\(.*expected images, texts or numbers"),
        ("?inputs=image", "unknown option 'inputs'; expected input, label"),
        ("@validation", "the folder has no split 'validation'; it has train, test"),
    ],
)
def test_what_is_not_there_is_named(pets: Path, spec: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        open_source(f"hfds:{pets}{spec}")


def test_what_could_be_either_must_be_named(tmp_path: Path) -> None:
    spec = saved(tmp_path / "two", question=["a"], answer=["b"], label=[0])
    with pytest.raises(
        SettingsError, match=r"has columns question, answer, label; choose the input"
    ):
        open_source(spec)
    assert len(open_source(f"{spec}?input=answer")) == 1
    spec = saved(tmp_path / "labels", text=["a"], label=[0], labels=[1])
    with pytest.raises(
        SettingsError, match=r"labels in columns label, labels; choose one with \?label"
    ):
        open_source(spec)
    assert open_source(f"{spec}?label=").fetch([0])[1].tolist() == [-1]


def test_a_sample_without_input_is_named(tmp_path: Path) -> None:
    spec = saved(tmp_path / "gap", text=["a", None], label=[0, 1])
    with pytest.raises(DataError, match="sample 1 has no text"):
        open_source(spec).fetch([0, 1])


def test_numbers_of_different_shapes_are_named(tmp_path: Path) -> None:
    spec = saved(tmp_path / "odd", x=[[1.0, 2.0], [1.0]], label=[0, 1])
    with pytest.raises(
        DataError, match="x of samples 0 to 1 have different shapes, or are not numbers"
    ):
        open_source(spec).fetch([0, 1])


@pytest.mark.parametrize("length", ["0", "x", "-1"])
def test_an_odd_length_is_refused(reviews: Path, length: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"length '{length}'; expected a whole number from 1 to"
    ):
        open_source(f"hfds:{reviews}?length={length}")


def test_what_cannot_be_loaded_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"hfds:no/such@train cannot be loaded \(\w+: .*; expected a hub id"
    ):
        open_source("hfds:no/such")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(
        SettingsError, match=r"x\.txt: expected a folder or one of \.parquet, \.csv"
    ):
        open_source(f"hfds:{tmp_path / 'x.txt'}")


def test_code_of_a_data_set_is_never_run(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, split: str, **options: object) -> object:
        received.update(options)
        return datasets.load_from_disk(str(pets))[split]

    def of_version_3(
        path: str, name: str | None, split: str, trust_remote_code: bool | None = None
    ) -> object:
        return load_dataset(path, name, split, trust_remote_code=trust_remote_code)

    received: dict[str, object] = {}
    monkeypatch.setattr(datasets, "load_dataset", of_version_3)
    open_source("hfds:me/pets")
    assert received == {"trust_remote_code": False}
    received.clear()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)  # later versions run none at all
    open_source("hfds:me/pets")
    assert received == {}


def test_a_missing_extra_is_named(pets: Path, without: Callable[[str], None]) -> None:
    without("datasets")
    with pytest.raises(
        SettingsError,
        match=r"hfds: needs datasets .*pip install 'softcache\[data\]' "
        r"\(or, in a clone, pip install -e '\.\[data\]'\)",
    ):
        open_source(f"hfds:{pets}")

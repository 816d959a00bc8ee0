"""Image folders: what is data, which classes there are, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.data.folder import FolderSource
from softcache.data.keys import sample_keys
from softcache.data.open import open_source
from softcache.errors import DataError, SettingsError


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(path)
    return path


def opened(spec: str) -> FolderSource:
    source = open_source(spec)
    assert isinstance(source, FolderSource)
    return source


# files and sub-folders
def test_what_begins_with_a_dot_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "0.png")
    write(tmp_path / "dog" / "0.png")
    write(tmp_path / ".ipynb_checkpoints" / "0.png")
    write(tmp_path / "cat" / ".ipynb_checkpoints" / "1.png")
    (tmp_path / "cat" / "._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"no image")
    source = opened(f"folder:{tmp_path}")
    assert source.class_names == ("cat", "dog")
    assert source.files == ("cat/0.png", "dog/0.png")
    assert source.labels.tolist() == [0, 1]


def test_sub_folders_are_searched_in_the_order_of_torchvision(tmp_path: Path) -> None:
    for file in ("b.png", "10.png", "9.png", "z/c/0.png", "z-y/0.png", "z/9.png", "A/1.png"):
        write(tmp_path / "cat" / file)
    write(tmp_path / "dog" / "day" / "0.png")
    source = opened(f"folder:{tmp_path}")
    names = ["10.png", "9.png", "b.png", "A/1.png", "z/9.png", "z-y/0.png", "z/c/0.png"]
    assert source.files == (*(f"cat/{name}" for name in names), "dog/day/0.png")
    assert source.labels.tolist() == [0] * 7 + [1]
    assert len(source.fetch(range(8))[0]) == 8


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "0.png")
    write(tmp_path / "pets" / "cat" / "0.png")
    (tmp_path / "pets" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pets" / "cat" / "again").symlink_to(tmp_path / "pets" / "cat")
    assert opened(f"folder:{tmp_path / 'pets'}").files == ("cat/0.png", "cat/more/0.png")


def test_an_empty_class_stays_a_class_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "ant" / "0.png")
    (tmp_path / "bee").mkdir()
    write(tmp_path / "cat" / "0.png")
    source = opened(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "bee", "cat")
    assert source.labels.tolist() == [0, 2]
    assert "classes without images, which stay classes: bee" in capsys.readouterr().out


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    write(tmp_path / "test" / "cat" / "0.png")
    write(tmp_path / "val" / "cat" / "0.png")
    expected = r"holds no images in test, val, which look like splits; .*such as @test"
    with pytest.raises(DataError, match=expected):
        open_source(f"folder:{tmp_path}")
    write(tmp_path / "test" / "0.png")  # a class that is called so
    assert opened(f"folder:{tmp_path}").class_names == ("test", "val")


# the order of classes
@pytest.mark.parametrize(
    ("names", "order"),
    [
        ([str(number) for number in range(12)], [str(number) for number in range(12)]),
        (["010", "9", "8"], ["8", "9", "010"]),
        (["0", "90", "180", "270"], ["0", "180", "270", "90"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["10", "9", "-1"], ["-1", "10", "9"]),
        (["b", "B", "a"], ["B", "a", "b"]),
    ],
)
def test_classes_are_sorted_as_numbers_if_they_count_classes(
    tmp_path: Path, names: list[str], order: list[str]
) -> None:
    for name in names:
        write(tmp_path / name / "0.png")
    (tmp_path / ".hidden").mkdir()
    source = opened(f"folder:{tmp_path}")
    assert list(source.class_names) == order
    assert source.files == tuple(f"{name}/0.png" for name in order)


def test_classes_give_the_order_of_the_sub_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        write(tmp_path / name / "0.png")
    source = opened(f"folder:{tmp_path}?classes=bee,wasp,ant")
    assert source.name == f"folder:{tmp_path.name}?classes=bee,wasp,ant@train"
    assert source.class_names == ("bee", "wasp", "ant")
    assert source.files == ("bee/0.png", "ant/0.png")
    assert source.labels.tolist() == [0, 2]
    assert "classes without images, which stay classes: wasp" in capsys.readouterr().out
    with pytest.raises(
        SettingsError, match=r"sub-folder 'bee' is not in classes=ant,wasp; .*ant, bee"
    ):
        open_source(f"folder:{tmp_path}?classes=ant,wasp")


# files that cannot be read
@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Twenty images in two classes, the even ones damaged."""
    for number in range(20):
        file = write(tmp_path / "pets" / "ab"[number % 2] / "x" / f"{number:02}.png", number)
        if number % 2 == 0 or number == 19:
            file.write_bytes(file.read_bytes()[:-30] if number else b"no image")
    return tmp_path / "pets"


def test_unreadable_files_are_listed_with_their_reasons(damaged: Path) -> None:
    counts: list[int] = []
    files = opened(f"folder:{damaged}").unreadable(lambda amount, note="": counts.append(amount))
    assert [file.split()[0] for file in files] == [
        *(f"a/x/{number:02}.png" for number in range(0, 20, 2)),
        "b/x/19.png",
    ]
    assert files[0] == "a/x/00.png (cannot identify image file)"
    assert sum(counts) == 20


def test_the_first_unreadable_file_names_all(damaged: Path) -> None:
    source = opened(f"folder:{damaged}")
    assert len(source.fetch([10, 11])[0]) == 2
    expected = (
        r"^11 of the 20 files in .* cannot be read as images: a/x/00\.png \(cannot identify .*"
        r"a/x/18\.png \(image file is truncated .*\) and 1 more; repair .* or leave them out with "
        r"\?unreadable=skip$"
    )
    with pytest.raises(DataError, match=expected) as raised:
        source.fetch([11, 4])
    assert "19.png" not in str(raised.value)  # ten are shown


def test_unreadable_files_can_be_left_out(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = opened(f"folder:{damaged}?unreadable=skip")
    assert source.files == tuple(f"b/x/{number:02}.png" for number in range(1, 19, 2))
    assert source.name == "folder:pets@train"
    assert source.class_names == ("a", "b")
    inputs, labels = source.fetch(range(9))
    assert labels.tolist() == [1] * 9
    assert (
        "11 of 20 files cannot be read as images and are left out: a/x/" in capsys.readouterr().out
    )
    whole = opened(f"folder:{damaged}").fetch(range(10, 19))[0]
    assert sample_keys(inputs).tolist() == sample_keys(whole).tolist()


def test_files_that_are_left_out_do_not_change_the_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softcache.data.images.DEPTH_SAMPLES", 2)  # the first and the third
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tif").write_bytes(b"no image")
    for number, value in ((1, 1000), (2, 100_000)):
        pixels = np.full((2, 2), value, np.int32)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{number}.tif")
    whole = opened(f"folder:{tmp_path}").fetch([1, 2])[0]
    skipped = opened(f"folder:{tmp_path}?unreadable=skip").fetch([0, 1])[0]
    assert sample_keys(skipped).tolist() == sample_keys(whole).tolist()


def test_nothing_changes_where_all_files_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a" / "0.png")
    skipping, plain = (opened(f"folder:{tmp_path}{o}") for o in ("?unreadable=skip", ""))
    assert (skipping.name, skipping.files) == (plain.name, plain.files)
    assert plain.unreadable() == []
    assert capsys.readouterr().out == ""


def test_a_folder_of_unreadable_files_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"1 of 1 files cannot be read as images: a/0\.png .*expected"
    ):
        open_source(f"folder:{tmp_path}?unreadable=skip")
    with pytest.raises(SettingsError, match="unreadable 'yes'; expected skip"):
        open_source(f"folder:{tmp_path}?unreadable=yes")

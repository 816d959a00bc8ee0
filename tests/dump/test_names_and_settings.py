"""The dump: file names, refused settings, and invalid data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.dump.check_resume import SETTINGS
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, SettingsError, SoftcacheError
from tests.conftest import CLASSES, make_arrays
from tests.dump.loop_cases import (
    BATCHES,
    TEACHER,
    StopAt,
    batches_of,
    batches_seen,
    begin,
    committed,
    data_of,
    whole,
)


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(TEACHER)
    return path


# names of the file
def test_the_unfinished_file_has_another_name(dump_config: DumpConfig, stop_at: StopAt) -> None:
    folder = dump_config.out.parent / "out"
    config = replace(dump_config, out=folder / "tiny.h5", eval_data=None)
    begin(config, stop_at)
    assert [path.name for path in folder.iterdir()] == ["tiny.h5.partial"]
    dump(config)
    assert [path.name for path in folder.iterdir()] == ["tiny.h5"]


def test_folders_on_the_way_are_made(dump_config: DumpConfig, tmp_path: Path) -> None:
    config = replace(dump_config, out=tmp_path / "not" / "yet" / "there.h5")
    assert dump(config).path == config.out


def test_a_finished_cache_is_left_alone(
    dump_config: DumpConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump(dump_config)
    before, seen = dump_config.out.stat(), batches_seen(tmp_path)
    capsys.readouterr()
    assert dump(dump_config).path == dump_config.out
    after = dump_config.out.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert batches_seen(tmp_path) == seen
    assert capsys.readouterr().out == (
        f"{dump_config.out} is already complete; nothing to do (--overwrite starts again)\n"
    )


def test_overwrite_makes_a_finished_cache_anew(dump_config: DumpConfig) -> None:
    dump(dump_config)
    changed = replace(dump_config, temperature=2.0, overwrite=True)
    assert dump(changed).header.temperature == 2.0


def test_overwrite_begins_an_unfinished_cache_anew(
    dump_config: DumpConfig, stop_at: StopAt, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None)
    begin(config, stop_at)
    overwriting = replace(config, overwrite=True)
    assert batches_of(overwriting, tmp_path) == batches_of(whole(config), tmp_path)
    begin(overwriting, stop_at)
    assert dump(replace(overwriting, temperature=2.0)).header.temperature == 2.0


def test_the_old_cache_stays_until_the_new_one_is_complete(
    dump_config: DumpConfig, stop_at: StopAt
) -> None:
    config = replace(dump_config, eval_data=None)
    before = dump(config).path.read_bytes()
    begin(replace(config, temperature=2.0, overwrite=True), stop_at)
    assert config.out.read_bytes() == before


@pytest.mark.usefixtures("small_blocks")
def test_a_stopped_overwrite_can_go_on(
    dump_config: DumpConfig, stop_at: StopAt, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None)
    dump(config)
    again = replace(config, temperature=2.0, overwrite=True)
    begin(again, stop_at, batch=BATCHES)
    saved = batches_of(whole(again), tmp_path) - batches_of(again, tmp_path)
    assert open_cache(config.out).header.temperature == 2.0
    assert saved == BATCHES - 2


def test_an_out_folder_that_cannot_be_made_is_told_with_advice(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SoftcacheError,
        match=r"^--out .*file/tiny\.h5: cannot create its folder \(.*\); give another --out$",
    ):
        dump(replace(dump_config, out=tmp_path / "file" / "tiny.h5"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_an_out_folder_without_permission_is_told(dump_config: DumpConfig, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(SoftcacheError, match="Permission denied; check the disk and its permi"):
        dump(replace(dump_config, out=folder / "tiny.h5"))


def test_an_out_that_is_a_folder_is_refused_before_the_first_row(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(
        SettingsError, match=r"^--out .*folder is a folder; name a file in it, such as .*\.h5$"
    ):
        dump(replace(dump_config, out=folder, overwrite=True))
    assert batches_seen(tmp_path) == 0


# other settings
def renamed_data(config: DumpConfig, folder: Path) -> DumpConfig:
    (folder / "other.npz").write_bytes(Path(config.data.removeprefix("npz:")).read_bytes())
    return replace(config, data=f"npz:{folder}/other.npz")


def shorter_data(config: DumpConfig, folder: Path) -> DumpConfig:
    images, labels = make_arrays()
    return data_of(config, folder, x_train=images[:-1], y_train=labels[:-1])


def teacher_of(config: DumpConfig, folder: Path, old: str, new: str) -> DumpConfig:
    """The same dump with a teacher of the same name and different source code."""
    folder = folder / "changed"
    folder.mkdir()
    (folder / "models.py").write_text(TEACHER.replace(old, new))
    return replace(config, teacher=f"{folder}/models.py:teacher")


# a change of each setting, and how the refusal describes it
CHANGES: dict[str, tuple[Callable[[DumpConfig, Path], DumpConfig], str]] = {
    "data": (renamed_data, "data 'npz:tiny.npz@train', now it is 'npz:other.npz@train'"),
    "data_samples": (shorter_data, "data_samples 300, now it is 299"),
    "first_sample": (
        lambda config, _: replace(config, shard=(1, 2)),
        "first_sample 0, now it is 150",
    ),
    "samples": (lambda config, _: replace(config, shard=(0, 2)), "samples 300, now it is 150"),
    "classes": (
        lambda config, folder: teacher_of(config, folder, "Teacher(5)", "Teacher(6)"),
        "classes 5, now it is 6",
    ),
    "teachers": (
        lambda config, folder: teacher_of(config, folder, "manual_seed(7)", "manual_seed(8)"),
        r"another teacher \(sha256 '\w{64}', now '\w{64}'\)",
    ),
    "temperature": (
        lambda config, _: replace(config, temperature=2.0),
        "temperature 4.0, now it is 2.0",
    ),
    "precision": (
        lambda config, _: replace(config, precision="bf16"),
        "precision 'fp32', now it is 'bf16'",
    ),
    "choice": (
        lambda config, _: replace(config, encoding="quantized"),
        "encoding 'dense', now it is 'quantized'",
    ),
    "first_view": (
        lambda config, _: replace(config, first_view=1),
        "first_view 0, now it is 1",
    ),
    # more views would be added to a finished cache, so they are not refused
    "views": (lambda config, _: replace(config, views=1), "views 2, now it is 1"),
    "augment": (
        lambda config, _: replace(config, augment="flip"),
        "augment 'shift:1', now it is 'flip'",
    ),
    "seed": (lambda config, _: replace(config, seed=1), "seed 0, now it is 1"),
    "must_understand": (
        lambda config, _: replace(config, embed_inputs=True),
        "nothing embedded, now inputs",
    ),
}


def test_every_setting_has_a_change_to_be_refused() -> None:
    assert set(CHANGES) == set(SETTINGS)


@pytest.fixture(params=["unfinished", "finished"])
def started(
    request: pytest.FixtureRequest, dump_config: DumpConfig, stop_at: StopAt
) -> tuple[DumpConfig, Path]:
    """Settings with two views, and the file that was started or finished with them."""
    config = replace(dump_config, views=2, augment="shift:1", eval_data=None)
    if request.param == "unfinished":
        return config, begin(config, stop_at)
    return config, dump(config).path


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("setting", CHANGES)
def test_other_settings_are_refused_by_name_and_the_file_is_kept(
    setting: str, started: tuple[DumpConfig, Path], tmp_path: Path
) -> None:
    config, path = started
    before = path.read_bytes()
    change, message = CHANGES[setting]
    with pytest.raises(
        SettingsError,
        match=rf"{path.name} was started with {message}; use the same, give another --out",
    ):
        dump(change(config, tmp_path))
    assert path.read_bytes() == before
    assert open_cache(dump(config).path).complete  # the original settings still work


def test_evaluation_data_that_would_not_be_recorded_are_refused(
    started: tuple[DumpConfig, Path], data_file: Path
) -> None:
    with pytest.raises(
        SettingsError, match=r"started with evaluation data none, now it is npz:tiny\.npz@test; use"
    ):
        dump(replace(started[0], eval_data=f"npz:{data_file}@test"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("what", ["x_train", "y_train"])
def test_other_data_under_the_same_name_are_refused(
    what: str, started: tuple[DumpConfig, Path], tmp_path: Path
) -> None:
    config, path = started
    images, labels = make_arrays()
    arrays: dict[str, npt.NDArray[Any]] = {"x_train": images, "y_train": labels}
    arrays[what][10] = (arrays[what][10] + 1) % CLASSES
    before = path.read_bytes()
    with pytest.raises(
        SettingsError,
        match=r"started with other data: sample 10 of npz:tiny\.npz@train differs; use",
    ):
        dump(data_of(config, tmp_path, **arrays))
    assert path.read_bytes() == before


# bad data and bad settings
@pytest.mark.parametrize("label", [CLASSES, -2])
def test_a_label_out_of_range_is_named(label: int, dump_config: DumpConfig, tmp_path: Path) -> None:
    images, labels = make_arrays()
    labels[200] = label
    with pytest.raises(
        DataError, match=rf"sample 200 has label {label}; expected 0 to 4, or -1 for none"
    ):
        dump(data_of(dump_config, tmp_path, x_train=images, y_train=labels, x=images, y=labels))


def test_a_label_out_of_range_keeps_what_was_done(
    dump_config: DumpConfig, small_blocks: None, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    labels[200] = 9
    config = replace(dump_config, eval_data=None)
    with pytest.raises(DataError, match="sample 200 has label 9"):
        dump(data_of(config, tmp_path, x_train=images, y_train=labels))
    assert committed(partial_path(config.out)) == 192 // 7


def test_a_label_out_of_range_in_the_evaluation_data_is_named(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    labels[20] = 9
    changed = data_of(dump_config, tmp_path, x_train=images, y_train=labels)
    with pytest.raises(DataError, match="sample 20 has label 9; expected 0 to 4"):
        dump(replace(dump_config, eval_data=changed.data))


def test_evaluation_data_without_labels_are_refused(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, _ = make_arrays()
    changed = data_of(dump_config, tmp_path, x_train=images)
    with pytest.raises(DataError, match="sample 0 has no label; evaluation needs labels"):
        dump(replace(dump_config, eval_data=changed.data))


def test_data_without_labels_are_dumped(dump_config: DumpConfig, tmp_path: Path) -> None:
    images, _ = make_arrays()
    cache = dump(data_of(dump_config, tmp_path, x_train=images))
    assert (cache.labels == -1).all()
    assert cache.header.summary is not None
    assert cache.header.summary["agreement"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf; expected a number above 0"),
        ({"views": 0}, "views is 0; expected a number from 1 to 1,048,576"),
        ({"seed": -1}, "seed is -1; expected a number from 0 to"),
        ({"batch_size": -1}, "batch-size is -1; expected 0 or more"),
        ({"workers": -1}, "workers is -1; expected 0 or more"),
        ({"precision": "fp8"}, "precision is fp8; expected one of fp32, tf32, bf16, fp16"),
        ({"views": 2}, "2 views without --augment would all be the same; add it, or ask for one"),
        ({"first_view": 3}, "1 views without --augment would all be the same; add it, or ask for"),
        ({"first_view": -1}, "--views starts at -1; expected 0 or more"),
        ({"shard": (2, 2)}, "shard is 2/2; expected I/N with I from 0 to N - 1"),
        ({"shard": (-1, 2)}, "shard is -1/2; expected I/N with I from 0 to N - 1"),
        ({"shard": (0, 0)}, "shard is 0/0; expected I/N with I from 0 to N - 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, dump_config: DumpConfig
) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(dump_config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment": "swirl"},
            "augmentation 'swirl' in 'swirl' is unknown; expected shift:PIXELS",
        ),
        ({"encoding": "zip"}, "encoding 'zip' is unknown; expected dense"),
        (
            {"device": "abacus"},
            "device abacus: torch cannot use it here .*; use --device auto or cpu",
        ),
        ({"classes": 7}, r"returns shape \(1, 5\) for samples 0 to 0; expected .*\(1, 7\)"),
        ({"data": "npz:nowhere.npz"}, r"npz:nowhere\.npz: no such file"),
        ({"shard": (0, 301)}, "301 shards of 300 samples; expected at most one shard per sample"),
        ({"like": Path("nowhere.h5")}, r"nowhere\.h5: No such file or directory; expected a cache"),
        (
            {"teacher": "nowhere.py:teacher"},
            r"no such file: nowhere\.py; expected FILE\.py:CALLABLE",
        ),
        ({"weights": Path("nowhere.pt")}, r"weights nowhere\.pt: no such file"),
        (
            {"temperature": 1e7},
            "^--temperature is 10000000.0; expected",
        ),
        (
            {"seed": 1 << 63},
            "^--seed is 9223372036854775808; expected",
        ),
        (
            {"classes": -1},
            "classes is -1; expected",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_file_is_made(
    changes: dict[str, Any], message: str, dump_config: DumpConfig
) -> None:
    with pytest.raises(SoftcacheError, match=message):
        dump(replace(dump_config, **changes))
    assert not list(dump_config.out.parent.glob("*.h5*"))

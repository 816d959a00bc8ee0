"""Frames of recordings: a teacher of many rows for samples without any labels of these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from softcache.cache import Cache, open_cache
from tests.cli.app_cases import softcache
from tests.frames import (
    FRAMES,
    decoded,
    distance,
    load_models,
    spoken,
    student_of,
    symbol_errors,
    train_recogniser,
    write_models,
    write_task,
)
from tests.train.loop_cases import metrics, same_weights, stop_at

POSITIONS = FRAMES // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models.py and the frames of 32 sequences, with a label for each sequence."""
    folder = tmp_path_factory.mktemp("frames")
    write_models(folder)
    frames = spoken(32)[0].numpy()
    np.savez(folder / "frames.npz", x_train=frames, y_train=np.arange(32) % 7)
    np.savez(folder / "bare.npz", x_train=frames)
    torch.manual_seed(0)
    torch.save(load_models(folder / "models.py").Recogniser(48).state_dict(), folder / "teacher.pt")
    return folder


def dump(folder: Path, name: str, data: str = "frames") -> list[str]:
    return [
        "dump", "--teacher", f"{folder}/models.py:teacher", "--data", f"npz:{folder}/{data}.npz",
        "--temperature", "1", "--out", str(folder / name),
    ]  # fmt: skip


def train(folder: Path, out: Path, *more: str, student: str = "student") -> list[str]:
    return [
        "train", str(folder / "frames.h5"), "--student", f"{folder}/models.py:{student}",
        "--out", str(out), "--epochs", "2", "--batch-size", "16",
        *([] if "--data" in more else ["--data", f"npz:{folder}/frames.npz"]), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    """A cache of 32 sequences."""
    result = softcache(*dump(folder, "frames.h5"))
    assert result.exit_code == 0, result.output
    labels = "without the labels of npz:frames.npz@train, which are those of samples"
    assert f"the teacher returns {POSITIONS} frames for each sample" in result.output
    assert labels in result.output
    return open_cache(folder / "frames.h5")


def test_rows_are_the_frames_of_the_teacher(folder: Path, cache: Cache) -> None:
    assert cache.header.unit == "frame"
    assert cache.header.row_count == 32 * POSITIONS
    assert (cache.labels == -1).all()
    assert (cache.header.summary or {})["agreement"] is None
    with torch.inference_mode():
        logits = load_models(folder / "models.py").teacher()(spoken(32)[0])
    expected = logits.log_softmax(-1).flatten(0, 1).numpy()
    assert np.abs(cache.rows(0, np.arange(cache.header.row_count)) - expected).max() < 0.01


def test_labels_of_samples_change_nothing(folder: Path, cache: Cache) -> None:
    result = softcache(*dump(folder, "bare.h5", "bare"))
    assert "which are those of samples" not in result.output
    bare = open_cache(folder / "bare.h5")
    rows = np.arange(bare.header.row_count)
    assert np.array_equal(bare.rows(0, rows), cache.rows(0, rows))


def test_the_whole_way(folder: Path, cache: Cache, tmp_path: Path) -> None:
    result = softcache(*train(folder, tmp_path / "run", "--workers", "2"))
    assert result.exit_code == 0, result.output
    assert "KL to teacher" in result.output
    lines = metrics(tmp_path / "run")
    assert lines[1]["teacher_kl"] < lines[0]["teacher_kl"]
    assert "hard" not in lines[-1]
    own, data = ["--student", f"{folder}/models.py:student"], ["--data", f"npz:{folder}/frames.npz"]
    result = softcache("compare", tmp_path / "run", "--cache", cache.path, *data, *own)
    assert result.exit_code == 0, result.output
    page = tmp_path / "report.html"
    result = softcache("report", tmp_path / "run", cache.path, *data, *own, "-o", page)
    assert result.exit_code == 0, result.output
    result = softcache("verify", cache.path, "--teacher", f"{folder}/models.py:teacher", *data)
    assert result.exit_code == 0, result.output
    assert softcache("export", tmp_path / "run", "--pt2", *own).exit_code == 0


def test_a_run_that_goes_on_is_one_that_never_stopped(
    folder: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert softcache(*train(folder, tmp_path / "whole")).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert softcache(*train(folder, tmp_path / "run")).exit_code == 130
    assert "resuming" in softcache(*train(folder, tmp_path / "run")).output
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "option"),
    [
        (["--baseline"], "--baseline"),
        (["--alpha", "0.5"], "--alpha 0.5"),
        (["--label-smoothing", "0.1"], "--label-smoothing"),
        (["--eval-data", "npz:frames.npz"], "--eval-data"),
    ],
)
def test_what_needs_labels_is_refused(
    folder: Path, cache: Cache, tmp_path: Path, more: list[str], option: str
) -> None:
    result = softcache(*train(folder, tmp_path / "run", *more))
    assert f"{option} needs labels, and the frames of {cache.path} have none" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            "shorter",
            f"student returns {POSITIONS - 1} positions, and the data has rows up to position",
        ),
        (
            "longer",
            f"student returns {FRAMES} positions, and the data has rows at {POSITIONS}; expected",
        ),
    ],
)
def test_a_student_of_other_positions_is_refused(
    folder: Path, cache: Cache, tmp_path: Path, student: str, message: str
) -> None:
    result = softcache(*train(folder, tmp_path / "run", student=student))
    assert result.exit_code != 0
    assert message in result.output


def test_other_recordings_do_not_join(folder: Path, cache: Cache, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=spoken(32, seed=3)[0].numpy())
    result = softcache(*train(folder, tmp_path / "run", "--data", f"npz:{tmp_path}/d.npz"))
    assert "sample 0 of npz:d.npz@train is not in" in result.output


def test_evaluation_of_a_teacher_of_frames_is_refused(folder: Path) -> None:
    result = softcache(*dump(folder, "no.h5"), "--eval-data", f"npz:{folder}/frames.npz")
    assert "no frame has a label; evaluation needs labels" in result.output
    assert not (folder / "no.h5").exists()


def test_distance_and_decoding() -> None:
    assert distance([1, 2, 3], [1, 3]) == 1
    assert distance([], [1, 3]) == 2
    assert distance([2, 1], [1, 2]) == 2
    path = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0])
    assert decoded(torch.nn.functional.one_hot(path, 3)[None].float()) == [[1, 1, 2]]


def test_a_student_recognises_more_after_distillation_than_after_its_own_training(
    tmp_path: Path,
) -> None:
    # the teacher was trained with CTC on more sequences than the student gets
    data = write_task(tmp_path, 60, 400, 12)
    teacher = ["--teacher", f"{tmp_path}/models.py:teacher", "--temperature", "1"]
    path = tmp_path / "frames.h5"
    assert softcache("dump", *teacher, "--data", data, "--out", path).exit_code == 0
    shape = ["--epochs", "40", "--batch-size", "32", "--lr", "0.005"]
    student = ["--student", f"{tmp_path}/models.py:student", "--data", data]
    result = softcache("train", path, *student, *shape, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    frames, sequences = spoken(400)
    torch.manual_seed(0)
    alone = load_models(tmp_path / "models.py").student()
    train_recogniser(alone, frames[:60], sequences[:60], 40)
    test = spoken(200, seed=7)
    distilled = student_of(tmp_path / "run", tmp_path / "models.py")
    assert symbol_errors(distilled, *test) < symbol_errors(alone, *test) - 0.05

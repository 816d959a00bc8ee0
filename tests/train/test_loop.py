"""The training loop: what a student learns, and that every sample gets its own soft targets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from softcache.cache import Cache
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError
from softcache.losses import soft_loss
from softcache.targets.encode import soften
from softcache.targets.fetch import tempered_targets
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.types import Views
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.configs import replace
from tests.conftest import CLASSES, SAMPLES, make_arrays
from tests.train.loop_cases import NOTHING, as_teacher, metrics, same_weights, save_data, soft

Targets = Callable[[int, npt.NDArray[np.int64]], Any]


# what a student learns
def test_a_student_learns_from_labels_alone(config: TrainConfig, data_file: Path) -> None:
    test = f"npz:{data_file}@test"
    (student,) = train(replace(config, cache=None, epochs=15, learning_rate=0.01, eval_data=test))
    assert student.evaluation is not None
    assert student.evaluation.errors <= 5  # of 100; 80 by chance
    lines = metrics(config.out)
    assert [line["epoch"] for line in lines] == list(range(1, 16))
    assert [line["step"] for line in lines] == list(range(5, 80, 5))
    assert not any("soft" in line for line in lines)
    assert lines[-1]["errors"] == student.evaluation.errors


def test_the_whole_job_gives_a_student_that_is_nearly_its_teacher(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, epochs=15, learning_rate=0.01, eval_data=dump_config.eval_data)
    train(replace(config, cache=None, student="mlp:64", out=tmp_path / "teacher"))
    trained = dump(
        replace(
            dump_config,
            teacher="mlp:64",
            weights=tmp_path / "teacher" / "student.safetensors",
            out=tmp_path / "trained.h5",
            views=3,
            augment="flip",
        )
    )
    assert trained.header.evaluation is not None
    capsys.readouterr()
    student, baseline = train(replace(config, student="mlp:16", cache=trained.path, baseline=True))
    assert student.evaluation is not None
    assert baseline.evaluation is not None
    errors = trained.header.evaluation["errors"]
    assert student.evaluation.errors <= errors + 10  # of 100
    assert soft(config.out)[-1] < soft(config.out)[0] / 2
    table = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in table[3:]] == [
        ["teacher", "4,485", "100.0%", f"{errors} of 100"],
        ["distilled", "1,125", "25.1%", f"{student.evaluation.errors} of 100"],
        ["hard labels", "1,125", "25.1%", f"{baseline.evaluation.errors} of 100"],
    ]


def test_the_teachers_errors_are_shown_only_for_the_data_they_were_counted_on(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for eval_data, shown in (
        (f"{config.data[0]}@test", True),
        (config.data[0], False),
        (None, False),
    ):
        train(replace(config, eval_data=eval_data, overwrite=True))
        row = re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[3])
        assert row[0] == "teacher"
        assert ("of 100" in row[3]) is shown
        assert (row[3] == "-") is not shown


def test_the_loss_has_its_two_parts_in_proportion(config: TrainConfig) -> None:
    train(replace(config, alpha=0.7, temperature=3.0))
    for line in metrics(config.out):
        assert line["soft"] > NOTHING
        expected = 0.7 * 3.0**2 * line["soft"] + 0.3 * line["hard"]
        assert line["total"] == pytest.approx(expected, rel=1e-5)


def test_the_cache_trains_like_the_live_teacher(
    config: TrainConfig, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, epochs=20, student="mlp:16")
    train(config)
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")().eval()
    source = open_source(config.data[0])

    def live(cache: Cache, temperatures: list[float], device: torch.device) -> Targets:
        def targets(view: Views, cache_rows: npt.NDArray[np.int64]) -> dict[float, Tensor]:
            with torch.no_grad():
                logits: Tensor = teacher(to_float(source.fetch(cache_rows.tolist())[0]))
            return {t: soften(logits, t) for t in temperatures}

        return targets

    monkeypatch.setattr("softcache.join.match.tempered_targets", live)
    train(replace(config, out=tmp_path / "live"))
    from_cache, from_teacher = metrics(config.out), metrics(tmp_path / "live")
    assert len(from_cache) * 5 == 100  # steps
    for cached_line, live_line in zip(from_cache, from_teacher, strict=True):
        assert cached_line["total"] == pytest.approx(live_line["total"], rel=1e-3)
    assert not same_weights(config.out, tmp_path / "live")  # so the targets had another source


# the right soft targets for every sample
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    config: TrainConfig, teacher_file: Path
) -> None:
    train(as_teacher(config, teacher_file))
    assert max(soft(config.out)) < NOTHING


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_targets_are_retempered_to_the_temperature_of_the_loss(
    temperature: float, config: TrainConfig, teacher_file: Path
) -> None:
    train(replace(as_teacher(config, teacher_file), temperature=temperature))
    assert max(soft(config.out)) < NOTHING
    # the targets as stored would be far off
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")()
    logits = teacher(to_float(open_source(config.data[0]).fetch(range(SAMPLES))[0]))
    assert soft_loss(logits, soften(logits, 4.0), temperature) > 100 * NOTHING


@pytest.mark.parametrize("rotate", [True, False])
def test_each_sample_is_seen_in_its_view_with_that_views_targets(
    rotate: bool,
    config: TrainConfig,
    dump_config: DumpConfig,
    teacher_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    views = dump(replace(dump_config, views=2, augment="shift:2", seed=5, overwrite=True))
    config = replace(as_teacher(config, teacher_file), cache=views.path, epochs=4, seed=1)
    config = replace(config, rotate=rotate)
    train(config)
    assert max(soft(config.out)) < NOTHING

    def with_views_swapped(*arguments: Any) -> Targets:
        targets = tempered_targets(*arguments)
        return lambda view, cache_rows: targets(1 - view, cache_rows)

    monkeypatch.setattr("softcache.join.match.tempered_targets", with_views_swapped)
    train(replace(config, overwrite=True))
    assert min(soft(config.out)) > 100 * NOTHING


def test_reordered_data_are_joined_by_content(
    config: TrainConfig,
    teacher_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = make_arrays()
    order = np.random.default_rng(3).permutation(SAMPLES)
    data = save_data(tmp_path, images[order], labels[order])
    config = replace(as_teacher(config, teacher_file), data=data)
    train(config)
    assert max(soft(config.out)) < NOTHING
    assert (
        "note: npz:tiny.npz@train is not in the order of the cache (first difference at sample "
        f"{int(np.flatnonzero(order != np.arange(SAMPLES))[0])}); joined by content\n"
        in capsys.readouterr().out
    )

    def joined_by_position(*arguments: Any) -> Targets:
        targets = tempered_targets(*arguments)
        return lambda view, cache_rows: targets(view, np.argsort(order)[cache_rows])

    monkeypatch.setattr("softcache.join.match.tempered_targets", joined_by_position)
    train(replace(config, overwrite=True))
    assert min(soft(config.out)) > 100 * NOTHING


def test_reordered_data_are_augmented_as_the_cache_was(
    config: TrainConfig, dump_config: DumpConfig, teacher_file: Path, tmp_path: Path
) -> None:
    views = dump(replace(dump_config, views=2, augment="shift:2", overwrite=True))
    images, labels = make_arrays()
    data = save_data(tmp_path, images[::-1], labels[::-1])
    train(replace(as_teacher(config, teacher_file), data=data, cache=views.path))
    assert max(soft(config.out)) < NOTHING


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "pixel",
            r"sample 10 of npz:tiny\.npz@train is not in .*tiny\.h5, .* \(1 of 300 are unknown\)",
        ),
        (
            "label",
            r"sample 10 of npz:tiny\.npz@train has label \d, but \d in .*tiny\.h5 \(1 labels",
        ),
        (
            "type",
            r"sample 0 of npz:tiny\.npz@train is not in .*tiny\.h5, .* \(300 of 300 are unknown\)",
        ),
    ],
)
def test_other_data_are_refused_before_a_folder_is_made(
    change: str, message: str, config: TrainConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    if change == "pixel":
        images[10, 0, 0, 0] ^= 1
    elif change == "label":
        labels[10] = (labels[10] + 1) % CLASSES
    else:
        images = images.astype(np.float32)
    with pytest.raises(DataError, match=message):
        train(replace(config, data=save_data(tmp_path, images, labels)))
    assert not config.out.exists()

"""Choosing the settings of students on held-out training samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import Cache
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import Interrupted, SettingsError
from softcache.train import loop, tune
from softcache.train.accelerator import make_accelerator
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.loop import train
from softcache.train.prepare import join_all
from softcache.train.student import Student
from softcache.train.tune import best_of, candidates, rounds, split
from softcache.train.tuning_record import NAME, Score, TuningRecord
from tests.cli.app_cases import softcache
from tests.configs import replace
from tests.train.loop_cases import contents, metrics, same_weights, save_data


@pytest.mark.parametrize("count", [2, 4, 5, 16, 64])
@pytest.mark.parametrize("epochs", [1, 20])
def test_all_rounds_together_cost_the_same_whatever_is_tried(count: int, epochs: int) -> None:
    plan = rounds(count, epochs)
    assert sum(tried * length for tried, length in plan) == pytest.approx(tune.COST * epochs)
    assert plan[0][0] == count
    assert plan[-1][0] <= tune.KEEP
    assert all(a[1] < b[1] for a, b in pairwise(plan))


@pytest.mark.parametrize(
    ("errors", "differing", "best"),
    [
        ((50, 40, 45), (0, 81, 9), 1),  # 10 fewer, standard error 9
        ((50, 41, 45), (0, 81, 9), 0),  # 9 fewer, standard error 9
        ((50, 50, 60), (0, 4, 30), 0),
        ((50, 60, 60), (0, 4, 30), 0),
    ],
)
def test_the_defaults_stay_unless_others_are_clearly_better(
    errors: tuple[int, ...], differing: tuple[int, ...], best: int
) -> None:
    assert best_of([Score(*pair) for pair in zip(errors, differing, strict=True)]) == best


def joined(config: TrainConfig, *caches: Cache) -> list[Any]:
    sources = [open_source(spec) for spec in config.data]
    config = replace(config, temperature=1.0)
    return join_all(config, sources, caches, make_accelerator("cpu", "fp32").device)


def test_what_is_held_out_is_not_trained_on(config: TrainConfig, cache: Cache) -> None:
    parts = joined(config, cache)
    trained, held_out = split(parts, seed=0)
    ids = trained[0].sample_ids, held_out[0].part.sample_ids
    assert sorted(np.concatenate(ids)) == sorted(parts[0].sample_ids)
    assert len(ids[1]) == int(tune.SHARE * len(parts[0]))
    assert (held_out[0].labels == parts[0].labels()[np.isin(parts[0].sample_ids, ids[1])]).all()
    other = split(parts, seed=1)[1][0].part.sample_ids
    assert not np.array_equal(ids[1], other)


def partly_labelled(dump_config: DumpConfig, tmp_path: Path, labelled: int) -> tuple[str, Cache]:
    """Data of which only the first samples have a label, and its cache."""
    arrays = np.load(dump_config.data.removeprefix("npz:").partition("@")[0])
    labels = arrays["y_train"].copy()
    labels[labelled:] = -1
    data = save_data(tmp_path, arrays["x_train"], labels)
    config = replace(dump_config, data=data, eval_data=None, out=tmp_path / "part.h5", classes=5)
    return data, dump(config)


def test_only_samples_with_a_label_are_held_out(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    data, cache = partly_labelled(dump_config, tmp_path, labelled=50)
    held_out = split(joined(replace(config, data=data), cache), seed=0)[1]
    assert len(held_out[0].labels) == 10
    assert (held_out[0].part.sample_ids < 50).all()
    (tmp_path / "few").mkdir()
    data, cache = partly_labelled(dump_config, tmp_path / "few", labelled=5)
    parts = joined(replace(config, data=data), cache)
    with pytest.raises(SettingsError, match="only 5 are labelled; expected 10 or more"):
        split(parts, seed=0)


def test_without_labels_the_teachers_top_class_counts(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    data, cache = partly_labelled(dump_config, tmp_path, labelled=0)
    parts = joined(replace(config, data=data), cache)
    held_out = split(parts, seed=0)[1][0]
    top = cache.rows(0, held_out.part.sample_ids).argmax(-1)
    assert (held_out.labels == top).all()
    augmentation = dataclasses.replace(parts[0].augmentation, mixup=True)
    mixed = dataclasses.replace(parts[0], augmentation=augmentation)
    with pytest.raises(SettingsError, match="none has a label, and in mixed views"):
        split([mixed], seed=0)


def settings_tried(config: TrainConfig, *caches: Cache, **given: Any) -> list[dict[str, Any]]:
    asked = replace(config, tune=64, **given)
    default = replace(asked, temperature=given.get("temperature", 1.0)).students[0]
    return candidates(asked.students[0], default, asked, joined(asked, *caches))


def test_the_defaults_are_tried_first_and_nothing_twice(config: TrainConfig, cache: Cache) -> None:
    tried = settings_tried(config, cache)
    assert tried[0] == {"temperature": 1.0, "alpha": 1.0, "loss": "kl", "learning_rate": 2e-3}
    assert len(tried) == 64
    assert len({json.dumps(point) for point in tried}) == 64
    assert {point["loss"] for point in tried} == set(tune.LOSSES)


def test_what_is_given_is_not_tried(config: TrainConfig, cache: Cache) -> None:
    tried = settings_tried(config, cache, temperature=3.0, loss="js", alpha=0.3)
    assert [list(point) for point in tried] == [["learning_rate"]] * 5
    with pytest.raises(SettingsError, match="--tune has nothing to choose for mlp:16"):
        settings_tried(config, cache, temperature=3.0, loss="js", alpha=0.3, learning_rate=0.1)


def test_of_hard_labels_only_the_learning_rate_is_tried(config: TrainConfig, cache: Cache) -> None:
    tried = settings_tried(config, cache, alpha=0.0)
    assert [list(point) for point in tried] == [["learning_rate"]] * 5


@pytest.mark.parametrize("encoding", ["sampled", "topk"])
def test_only_what_the_cache_allows_is_tried(
    encoding: str, config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    spec = {"sampled": "sampled:50", "topk": "topk:2"}[encoding]
    cache = dump(replace(dump_config, encoding=spec, temperature=1.0, out=tmp_path / "few.h5"))
    tried = settings_tried(replace(config, cache=cache.path), cache)
    assert "mse" not in {point["loss"] for point in tried}
    assert ("temperature" in tried[0]) == (encoding == "topk")


def test_the_run_is_that_of_the_chosen_settings_alone(
    config: TrainConfig,
    dump_config: DumpConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # in so few steps, the default learns nothing
    monkeypatch.setattr(tune, "RATES", (1.0, 10.0))
    data, cache = partly_labelled(dump_config, tmp_path, labelled=0)
    config = replace(config, data=data, cache=cache.path, epochs=10, loss="kl", temperature=1.0)
    train(replace(config, tune=2))
    assert sorted(contents(config.out)) == [
        "README.md", "config.json", "metrics.jsonl", "student.safetensors", NAME,
    ]  # fmt: skip
    settings = json.loads((config.out / "config.json").read_text())["settings"]
    chosen = {name: settings[name] for name in ("temperature", "loss", "learning_rate")}
    assert settings["tune"] == 2
    assert chosen["learning_rate"] == 2e-2
    train(replace(config, out=tmp_path / "alone", **chosen))
    assert same_weights(config.out, tmp_path / "alone")


def test_evaluation_data_have_no_say(config: TrainConfig, data_file: Path, tmp_path: Path) -> None:
    train(replace(config, tune=4))
    evaluated = replace(config, tune=4, eval_data=f"npz:{data_file}@test", out=tmp_path / "other")
    train(evaluated)
    rounds = [json.loads((out / NAME).read_text())["rounds"] for out in (config.out, evaluated.out)]
    assert rounds[0] == rounds[1]
    assert same_weights(config.out, evaluated.out)


def test_seeds_share_the_chosen_settings_and_folders_keep_their_names(
    config: TrainConfig,
) -> None:
    students = [
        StudentConfig(student=spec, seed=seed) for spec in ("mlp:16", "mlp:8") for seed in (0, 1)
    ]
    trained = train(replace(config, students=students, tune=4))
    names = ["mlp-16-seed=0", "mlp-16-seed=1", "mlp-8-seed=0", "mlp-8-seed=1"]
    assert sorted(path.name for path in config.out.iterdir()) == [*names, NAME]
    for first, second in (trained[:2], trained[2:]):
        assert first.config == dataclasses.replace(second.config, seed=0)
    assert len(json.loads((config.out / NAME).read_text())["rounds"]) == 2


def test_a_stopped_tuning_continues_after_its_last_round(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, tune=6, epochs=4)
    train(replace(config, out=tmp_path / "whole"))
    calls, fit = [], loop.fit

    def stopping(*arguments: Any, **options: Any) -> list[Student]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(loop, "fit", stopping)
    with pytest.raises(Interrupted, match="stopped while settings were tried; the same command"):
        train(config)
    assert [path.name for path in config.out.iterdir()] == [NAME]
    train(config)
    assert len(calls) == 4  # the second round, and the training
    assert same_weights(config.out, tmp_path / "whole")
    assert metrics(config.out) == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        lambda facts: facts | {"settings": {}},
        lambda facts: facts | {"rounds": [[{"errors": 0, "differing": 0}]]},
        lambda facts: facts | {"rounds": [[{"errors": -1, "differing": 0}] * 3]},
        lambda facts: facts | {"rounds": 7},
        lambda facts: [],
    ],
)
def test_a_record_of_another_run_does_not_count(
    damage: Callable[[Any], Any], config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, tune=3)
    train(config)
    facts = json.loads((config.out / NAME).read_text())
    (config.out / NAME).write_text(json.dumps(damage(facts)))
    train(replace(config, overwrite=True))
    assert json.loads((config.out / NAME).read_text())["rounds"] == facts["rounds"]


def test_a_record_is_read_back(tmp_path: Path) -> None:
    record = TuningRecord(tmp_path / NAME, {"epochs": 3})
    record.add([Score(3, 0), Score(2, 1)])
    record.add([Score(1, 0)])
    again = TuningRecord.read(tmp_path / NAME, {"epochs": 3})
    assert again.rounds == record.rounds == [[Score(3, 0), Score(2, 1)], [Score(1, 0)]]


def test_settings_that_fail_make_every_error(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "RATES", (1.0, 1e5))
    config = replace(
        config, student="cnn:4,4", weight_decay=1e3, tune=2, temperature=1.0, alpha=1.0
    )
    train(replace(config, loss="kl"))
    ((default, failed),) = json.loads((config.out / NAME).read_text())["rounds"]
    assert failed["errors"] == 60
    assert default["errors"] < 60


def test_it_needs_a_cache(config: TrainConfig) -> None:
    with pytest.raises(SettingsError, match="--tune needs a CACHE of soft targets"):
        replace(config, cache=None, tune=16)


def test_the_command_says_what_it_chose_and_why(config: TrainConfig, tmp_path: Path) -> None:
    arguments = [
        "train", str(config.caches[0]), "--data", config.data[0], "--student", "mlp:16", "--epochs", "2",
        "--out", str(tmp_path / "told"),
    ]  # fmt: skip
    result = softcache(*arguments, "--tune")
    assert result.exit_code == 0
    assert "tuning: 16 settings of mlp:16, 0.081 epochs each" in result.stdout
    assert "tuning: 4 settings of mlp:16, 0.33 epochs each" in result.stdout
    assert "errors on 60 held-out samples" in result.stdout
    assert "The teacher was not needed" in result.stdout
    result = softcache(*arguments, "--overwrite", "--tune", "1")
    assert result.exit_code != 0
    assert "--tune is 1; expected a number from 2 to 1,024" in result.stderr

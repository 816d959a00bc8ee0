"""Several students in one run: each ends up as if it had been trained alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import SettingsError
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.configs import replace
from tests.conftest import Run


@pytest.fixture
def config(cache: Cache, data_file: Path, tmp_path: Path) -> TrainConfig:
    """A short run from the tiny cache with evaluation data."""
    return make_train_config(
        student="mlp:8",
        cache=cache.path,
        data=f"npz:{data_file}",
        eval_data=f"npz:{data_file}@test",
        out=tmp_path / "run",
        epochs=2,
        batch_size=64,
        device="cpu",
    )


DIFFERENT: list[dict[str, Any]] = [
    {"student": "mlp:8"},
    {"student": "cnn:4", "learning_rate": 0.01},
    {"student": "mlp:8", "temperature": 2.0, "alpha": 1.0},
    {"student": "mlp:8", "loss": "dkd:2", "ema": 0.9},
    {"student": "mlp:8", "optimizer": "sgd", "max_grad_norm": 1.0},
]


def test_each_is_what_it_would_be_alone(config: TrainConfig, tmp_path: Path) -> None:
    together = train(replace(config, students=DIFFERENT))
    for number, variant in enumerate(DIFFERENT):
        alone = replace(config, **variant, out=tmp_path / str(number))
        train(alone)
        weights = load_file(together[number].folder / "student.safetensors")
        for name, tensor in load_file(alone.out / "student.safetensors").items():
            assert torch.equal(weights[name], tensor), (number, name)
        lines = [
            (folder / "metrics.jsonl").read_bytes()
            for folder in (alone.out, together[number].folder)
        ]
        assert lines[0] == lines[1]


def test_folders_are_named_by_what_differs(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, students=[{"alpha": 0.5}, {"alpha": 1.0}], baseline=True))
    assert sorted(path.name for path in config.out.iterdir()) == ["alpha=0.5", "alpha=1.0"]
    # one baseline for both, since theirs would be the same
    assert [path.parent.name for path in config.out.glob("*/baseline")] == ["alpha=0.5"]
    facts = json.loads((config.out / "alpha=1.0" / "config.json").read_text())
    assert facts["settings"]["alpha"] == 1.0
    assert "variants" not in facts["settings"]


def test_a_file_of_options_and_students(
    config: TrainConfig, cache: Cache, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "run.toml").write_text(
        f"""
data = "{config.data[0]}"
epochs = 1
batch-size = 64

[[student]]
student = "mlp:8"
alpha = 1

[[student]]
student = "cnn:4"
lr = 0.01
"""
    )
    result = run(
        "train", cache.path, "--config", "run.toml", "--out", "toml", "--epochs", 2, check=True
    )
    assert "distilled mlp-8" in result.stdout
    folders = sorted((tmp_path / "toml").iterdir())
    assert len(folders) == 2
    for folder in folders:
        facts = json.loads((folder / "config.json").read_text())
        assert facts["settings"]["epochs"] == 2  # the command line overrides the file
        assert facts["settings"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "Error: --config run.toml: 'epoch' is not an option of softcache train"),
        (
            "[[student]]\nlr = 'x'\nstudent = 'mlp:8'",
            "Error: learning rate is 'x'; expected a number",
        ),
        ("epochs = 1.9", "Error: Invalid value for '--epochs': '1.9' is not a valid integer"),
        ("epochs = 'many'", "Error: Invalid value for '--epochs': 'many' is not a valid integer"),
        ("[[student]\n", "Error: --config run.toml cannot be read: "),
    ],
)
def test_a_mistake_in_the_file_is_told(
    text: str, message: str, cache: Cache, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "run.toml").write_text(text)
    result = run("train", cache.path, "--config", "run.toml", "--out", "toml", "--data", "npz:x")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "toml").exists()


def test_no_student_is_told(cache: Cache, run: Run) -> None:
    result = run("train", cache.path, "--out", "run", "--data", "npz:x")
    assert result.returncode == 2
    assert "Error: no student; name one with --student" in result.stderr


@pytest.mark.parametrize(
    ("encoding", "augment", "loss", "message"),
    [
        (
            "topk:2",
            None,
            "mse",
            r"loss mse needs the probabilities of all classes, and .* is topk; use",
        ),
        ("sampled:9", None, "reverse_kl", r"loss reverse_kl needs .* is sampled; use --loss kl"),
        ("sampled:9", None, "correlation", r"loss correlation needs .* is sampled; use --loss kl"),
        (
            "dense",
            "mixup",
            "dkd",
            r"loss dkd needs one label per sample, and .* has mixed samples; use --loss kl",
        ),
    ],
)
def test_a_loss_that_the_cache_cannot_serve_is_refused_before_a_folder_is_made(
    encoding: str,
    augment: str | None,
    loss: str,
    message: str,
    config: TrainConfig,
    dump_config: DumpConfig,
    tmp_path: Path,
) -> None:
    out = tmp_path / "other.h5"
    dump(replace(dump_config, encoding=encoding, augment=augment, out=out, eval_data=None))
    with pytest.raises(SettingsError, match=message):
        train(replace(config, cache=out, loss=loss))
    assert not config.out.exists()


@pytest.mark.parametrize("loss", ["reverse_kl", "js", "dkd", "correlation"])
def test_losses_train_from_topk(
    loss: str, config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    dump(replace(dump_config, encoding="topk:3", out=tmp_path / "topk.h5", eval_data=None))
    (student,) = train(replace(config, cache=tmp_path / "topk.h5", loss=loss, epochs=6))
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["soft"] < lines[0]["soft"]
    assert student.evaluation is not None


def test_patience_needs_evaluation_data(config: TrainConfig) -> None:
    with pytest.raises(
        SettingsError, match="--patience counts errors after each epoch; add --eval-d"
    ):
        replace(config, patience=2, eval_data=None)


def test_a_patient_student_is_saved_at_its_best(config: TrainConfig) -> None:
    train(replace(config, epochs=40, patience=2, learning_rate=0.05, schedule="constant"))
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    errors = [line["errors"] for line in lines]
    assert len(lines) < 40
    assert errors.index(min(errors)) == len(errors) - 3
    assert json.loads((config.out / "config.json").read_text())["errors"] == min(errors)


def test_tensorboard_has_the_metrics(config: TrainConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(config, tensorboard=True))
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    for name in ("total", "errors", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(n, pytest.approx(line[name])) for n, line in enumerate(lines, 1)]


def test_tensorboard_that_is_not_there_is_told_before_the_work(
    config: TrainConfig, without: Callable[[str], None]
) -> None:
    without("tensorboard")
    with pytest.raises(SettingsError, match=r"--tensorboard needs .*'softcache\[tensorboard\]'"):
        train(replace(config, tensorboard=True))
    assert not config.out.exists()

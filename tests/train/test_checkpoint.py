"""A stopped run resumes as if it had never stopped, and ends with the same weights bit for bit."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import Interrupted, ModelError, SettingsError, SoftcacheError
from softcache.train import checkpoint
from softcache.train.checkpoint import NAME, Checkpoint, Position
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.student import Student
from tests.configs import replace
from tests.conftest import Run
from tests.train.loop_cases import stop_at

STEPS = 15  # per run: 3 epochs of 5

STUDENT = """
from torch import nn

def student():
    layers = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 5)
    return nn.Sequential(nn.Flatten(), *layers)
"""


@pytest.fixture
def config(cache: Cache, data_file: Path, tmp_path: Path) -> TrainConfig:
    """A student with dropout and norms, and a checkpoint after every step."""
    (tmp_path / "dropout.py").write_text(STUDENT)
    return make_train_config(
        student=f"{tmp_path / 'dropout.py'}:student",
        data=f"npz:{data_file}",
        eval_data=f"npz:{data_file}@test",
        cache=cache.path,
        out=tmp_path / "run",
        epochs=3,
        batch_size=64,
        checkpoint_minutes=0.0,
        device="cpu",
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "max_grad_norm": 1.0},
    "averaged": {"ema": 0.9, "micro_batches": 3},
    "patient": {"patience": 1, "learning_rate": 0.05},
    "augmented": {"extra_augment": "shift:2,cutout:3"},
    "balanced": {"class_weights": "balanced", "sampling": "balanced", "alpha": 0.5},
    "with a baseline": {"baseline": True},
    "several": {"students": [{"alpha": 0.5}, {"temperature": 2.0, "loss": "js"}, {"seed": 3}]},
    "with worker processes": {"workers": 2},
}


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stopped_run_comes_to_the_same_files(
    name: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, **SETTINGS[name])
    train(config)
    whole = files(config.out)
    assert not any(NAME in path for path in whole)
    again = replace(config, out=tmp_path / "again" / "run")
    stops = random.Random(name).sample(range(2, STEPS), 3)
    for step in stops:
        with monkeypatch.context() as patched:
            stop_at(patched, step)
            try:
                train(again)
            except Interrupted:
                assert (again.out / NAME).exists()
            else:
                break  # with patience the run can be over before
    else:
        train(again)
    assert files(again.out) == whole


@pytest.mark.parametrize("part", ["random", "optimizer", "average", "schedule"])
def test_a_part_that_is_not_restored_would_be_noticed(
    part: str, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, ema=0.9)
    train(config)
    whole = files(config.out)
    again = replace(config, out=tmp_path / "again")
    with monkeypatch.context() as patched:
        stop_at(patched, 8)
        with pytest.raises(Interrupted, match="the same command continues"):
            train(again)

    restore = checkpoint._restore

    def restore_all_but_part(student: Student, *state: Any) -> None:
        initial = copy.deepcopy(getattr(student, part))
        restore(student, *state)
        if part == "random":
            student.random = initial
        else:
            getattr(student, part).load_state_dict(initial.state_dict())

    monkeypatch.setattr(checkpoint, "_restore", restore_all_but_part)
    train(again)
    assert files(again.out)["student.safetensors"] != whole["student.safetensors"]


def test_kill_9_at_any_time_costs_nothing(config: TrainConfig, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "softcache", "train", str(config.caches[0]),
        f"--student={config.students[0].student}",
        f"--data={config.data[0]}", f"--eval-data={config.eval_data}", "--epochs=3",
        "--batch-size=64", "--checkpoint-minutes=0", "--device=cpu",
    ]  # fmt: skip
    # in a process as well, since the number of threads changes the last bits
    subprocess.run([*command, f"--out={config.out}"], check=True, stdout=subprocess.DEVNULL)
    whole = files(config.out)
    again = replace(config, out=tmp_path / "again" / "run")
    command.append(f"--out={again.out}")
    rng, kills = random.Random(4), 0
    while not (again.out / "metrics.jsonl").exists():
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as job:
            while job.poll() is None and not (again.out / "metrics.jsonl.partial").exists():
                time.sleep(0.002)
            if kills < 2:
                time.sleep(rng.uniform(0, 0.15))
                job.send_signal(signal.SIGKILL)
                kills += 1
            assert job.stderr is not None
            errors = job.stderr.read()
        assert job.returncode in (0, -signal.SIGKILL), errors
    assert kills == 2
    assert files(again.out) == whole


def test_the_place_is_told(config: TrainConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, 8)
        with pytest.raises(
            Interrupted, match="stopped; the same command continues from the last che"
        ):
            train(config)
    result = run(
        "train", config.caches[0], "--student", config.students[0].student, "--data",
        config.data[0], "--eval-data", config.eval_data, "--out", config.out, "--epochs", 3,
        "--batch-size", 64, "--device", "cpu",
        check=True,
    )  # fmt: skip
    assert f"resuming {config.out} at epoch 2, batch 2 (remove checkpoint" in result.stdout


def test_how_often_is_as_asked(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[Position] = []
    save = Checkpoint.save

    def record(self: Checkpoint, students: list[Student], position: Position) -> None:
        positions.append(position)
        save(self, students, position)

    monkeypatch.setattr(Checkpoint, "save", record)
    train(replace(config, checkpoint_minutes=10.0))
    assert positions == [Position(1), Position(2), Position(3)]
    positions.clear()
    train(replace(config, out=config.out.with_name("often")))
    assert len(positions) == STEPS + 3


# checkpoints that a run cannot resume from


@pytest.fixture
def stopped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A run that was stopped at its 8th step."""
    with monkeypatch.context() as patched:
        stop_at(patched, 8)
        with pytest.raises(Interrupted, match="the same command continues"):
            train(config)
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"epochs": 4},
            "was started with epochs 3, now it is 4; use the same settings, give another --out, or",
        ),
        ({"batch_size": 32}, "was started with batch_size 64, now it is 32"),
        ({"seed": 1}, "was started with seed 0, now it is 1"),
        ({"learning_rate": 0.1}, r"was started with students \[\{.*"),
        ({"eval_data": None}, "was started with eval_data .*, now it is null"),
    ],
)
def test_other_settings_do_not_go_on(
    change: dict[str, Any], message: str, stopped: TrainConfig
) -> None:
    before = files(stopped.out)
    with pytest.raises(SettingsError, match=message):
        train(replace(stopped, **change))
    assert files(stopped.out) == before
    train(replace(stopped, **change, overwrite=True))
    assert not (stopped.out / NAME).exists()


def test_a_checkpoint_without_newer_settings_goes_on_with_their_defaults(
    stopped: TrainConfig, tmp_path: Path
) -> None:
    path = stopped.out / NAME
    state, tensors = checkpoint.read_checkpoint(path)
    del state["settings"]["sampling"]
    for student in state["settings"]["students"]:
        del student["class_weights"]
    write_checkpoint(path, state, tensors)
    with pytest.raises(SettingsError, match='was started with sampling "uniform", now it is "bal'):
        train(replace(stopped, sampling="balanced"))
    with pytest.raises(SettingsError, match="was started with students"):
        train(replace(stopped, class_weights="balanced"))
    train(stopped)
    train(replace(stopped, out=tmp_path / "whole"))
    assert (
        files(stopped.out)["student.safetensors"]
        == files(tmp_path / "whole")["student.safetensors"]
    )


def test_another_cache_does_not_go_on(
    stopped: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    other = dump(replace(dump_config, temperature=2.0, out=tmp_path / "other.h5"))
    with pytest.raises(SettingsError, match=r"was started with cache \[\[.*\]\], now it is \[\["):
        train(replace(stopped, cache=other.path))


def test_changed_code_of_the_student_does_not_go_on(stopped: TrainConfig) -> None:
    path = Path(stopped.students[0].student.removesuffix(":student"))
    path.write_text(path.read_text().replace("0.3", "0.4"))
    with pytest.raises(SettingsError, match="was started with students"):
        train(stopped)


def test_workers_and_how_often_may_change(stopped: TrainConfig, tmp_path: Path) -> None:
    train(replace(stopped, workers=1, checkpoint_minutes=5.0))
    train(replace(stopped, out=tmp_path / "whole"))
    assert (stopped.out / "student.safetensors").read_bytes() == (
        tmp_path / "whole" / "student.safetensors"
    ).read_bytes()


def write_checkpoint(path: Path, state: object, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint whose digest is right, whatever is in it."""
    text = state if isinstance(state, str) else json.dumps(state)
    digest = checkpoint.digest_of(text, tensors)
    save_file(dict(tensors), path, metadata={"softcache": text, "digest": digest})


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def damage_state(path: Path) -> None:
    save_file(load_file(path), path, metadata={"softcache": "{"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def change_a_weight(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def drop_the_digest(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        save_file(load_file(path), path, metadata={"softcache": file.metadata()["softcache"]})


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage", [damage_header, damage_state, truncate, change_a_weight, drop_the_digest, pipe]
)
def test_a_checkpoint_that_cannot_be_read_is_told(
    damage: Callable[[Path], None], stopped: TrainConfig
) -> None:
    damage(stopped.out / NAME)
    with pytest.raises(
        SettingsError, match=r"checkpoint\.safetensors cannot be read as a checkpoint.*--overwr"
    ):
        train(stopped)
    train(replace(stopped, overwrite=True))


def without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        gone = next(key for key in tensors if name in key)
        del tensors[gone]
        state["tensors"].remove(gone)

    return change


def fact(name: str, value: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (state if name in state else state["students"][0])[name] = value

    return change


def tensor(
    name: str, make: Callable[[Tensor], Tensor]
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if name in key)
        tensors[key] = make(tensors[key]).contiguous()

    return change


@pytest.mark.parametrize(
    "change",
    [
        without(".model."), without(".random.0"), tensor(".model.", lambda t: t[:1]),
        tensor(".model.", lambda t: t.double()), tensor(".exp_avg", lambda t: t.reshape(-1)[:2]),
        tensor(".random.0", lambda t: t.float()), fact("students", []), fact("students", {}),
        fact("epoch", "1"), fact("batch", -1), fact("history", [{"epoch": 0}]),
        fact("history", [{"epoch": 1, "total": "x"}]), fact("rates", []), fact("rates", ["x"]),
        fact("rates", [2e-3, "x"]), fact("rates", [-1.0, 2e-3]), fact("rates", [2e-3, 1e300]),
        tensor(".step", lambda t: -t), tensor(".step", lambda t: t * 1e30),
        tensor(".exp_avg_sq", lambda t: t - 1), tensor(".exp_avg", lambda t: t * torch.nan),
        fact("schedule", []), fact("steps", 1.5), fact("evaluation", [7]), fact("evaluation", [9, 5]),
        fact("history", [{"epoch": 1, "total": 1.0}]),
        fact("stopped", 1), fact("failed", "no"), fact("tensors", []), fact("settings", []),
    ],
)  # fmt: skip
def test_a_checkpoint_that_somebody_made_is_refused_in_one_line(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], stopped: TrainConfig
) -> None:
    path = stopped.out / NAME
    state, tensors = checkpoint.read_checkpoint(path)
    change(state, tensors)
    write_checkpoint(path, state, tensors)
    with pytest.raises(SettingsError, match=r"checkpoint\.safetensors .*--overwrite") as raised:
        train(stopped)
    assert "\n" not in str(raised.value)
    assert not (stopped.out / "student.safetensors").exists()


def test_nothing_in_a_checkpoint_is_run_or_pickled(stopped: TrainConfig) -> None:
    raw = (stopped.out / NAME).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert json.loads(header.pop("__metadata__")["softcache"])["epoch"] == 1
    assert {entry["dtype"] for entry in header.values()} <= {"F32", "I64", "U8"}


def test_a_full_disk_keeps_the_checkpoint_before(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Path.write_bytes, iter(range(100))

    def fail_half_way(self: Path, data: bytes) -> int:
        if NAME in self.name and next(calls) == 7:
            write(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    message = r"cannot write .*checkpoint\.safetensors: No space left on device; free some"
    with pytest.raises(SoftcacheError, match=message):
        train(config)
    assert not list(config.out.glob(".*"))
    monkeypatch.undo()
    train(config)
    train(replace(config, out=config.out.with_name("whole")))
    assert (
        files(config.out)["student.safetensors"]
        == (files(config.out.with_name("whole"))["student.safetensors"])
    )


def test_what_could_not_be_saved_is_saved_by_the_same_command(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the very end, after one of two students was saved."""
    config = replace(config, students=[{"seed": 0}, {"seed": 1}])
    train(config)
    whole = files(config.out)
    again = replace(config, out=tmp_path / "again" / "run")
    save, calls = Student.save, iter(range(10))

    def fail_at_second(self: Student, facts: dict[str, Any]) -> dict[str, Any]:
        if next(calls) == 1:
            raise SoftcacheError("no room")
        return save(self, facts)

    with monkeypatch.context() as patched:
        patched.setattr(Student, "save", fail_at_second)
        with pytest.raises(SoftcacheError, match="no room"):
            train(again)
    monkeypatch.setattr(Student, "step", None)  # a further step would fail
    train(again)
    assert files(again.out) == whole


def test_weights_that_are_not_finite_are_not_saved(config: TrainConfig, tmp_path: Path) -> None:
    """A single step has a finite loss, but leaves weights that are not finite."""
    broken = replace(
        config, student="cnn:4", epochs=1, batch_size=300, learning_rate=1e6, weight_decay=1e35, warmup=0.0
    )  # fmt: skip
    with pytest.raises(
        ModelError, match=r"is not finite after epoch 1; lower --lr, or add --max-grad-norm 1"
    ):
        train(broken)
    assert not (config.out / "student.safetensors").exists()


# failures of some of several students


def test_a_student_that_fails_leaves_the_others(
    config: TrainConfig, run: Run, tmp_path: Path
) -> None:
    several = [
        "train", config.caches[0], "--student", "mlp:4", "--data", config.data[0], "--out", tmp_path / "grid",
        "--epochs", 2, "--batch-size", 64, "--device", "cpu", "--grid", "lr=1e-3,1e6",
        "--student", "cnn:4,4", "--weight-decay", 1e3,
    ]  # fmt: skip
    result = run(*several)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: 2 of 4 students failed: distilled mlp-4-lr=1000000.0: the loss")
    assert "lower --lr" in last
    finished = {path.parent.name for path in (tmp_path / "grid").glob("*/student.safetensors")}
    assert finished == {"mlp-4-lr=0.001", "cnn-4,4-lr=0.001"}
    alone = replace(
        config, student="mlp:4", learning_rate=1e-3, out=tmp_path / "alone", epochs=2, eval_data=None,
        weight_decay=1e3,
    )  # fmt: skip
    train(alone)
    together = load_file(tmp_path / "grid" / "mlp-4-lr=0.001" / "student.safetensors")
    for name, tensor in load_file(alone.out / "student.safetensors").items():
        assert torch.equal(tensor, together[name])
    assert np.isfinite(
        json.loads((alone.out / "metrics.jsonl").read_text().splitlines()[-1])["total"]
    )

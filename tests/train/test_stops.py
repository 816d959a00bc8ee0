"""Training runs: reproducible results, the files they leave, and what stops them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.cache import Cache
from softcache.cache.reader import partial_path
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, Interrupted, ModelError, SettingsError, SoftcacheError
from softcache.models.build import build
from softcache.models.evaluate import evaluate
from softcache.train.checkpoint import NAME
from softcache.train.config import MAX_LEARNING_RATE, TrainConfig
from softcache.train.loop import train
from softcache.train.run_folder import UNFINISHED_METRICS
from tests.commands import IMPATIENT
from tests.configs import replace
from tests.conftest import CLASSES, make_arrays
from tests.train.loop_cases import contents, metrics, same_weights, save_data, soft, weights

# a student that counts its training steps in a file, and at one step does what the environment says
STUDENT = """
import os, time
from pathlib import Path

import torch
from torch import nn

STEPS = Path(__file__).with_name("steps")

class Student(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        logits = self.linear(x.flatten(1))
        if self.training:
            with STEPS.open("a") as file:
                file.write("x")
            if STEPS.stat().st_size == int(os.environ.get("STUDENT_AT", 0)):
                return self.act(logits, os.environ["STUDENT_DOES"])
        return logits

    def act(self, logits, action):
        if action == "raise":
            raise ValueError("no more")
        if action == "interrupt":
            raise KeyboardInterrupt
        if action == "sleep":
            time.sleep(60)
        return {"nan": logits * torch.nan, "tuple": (logits, logits), "3-d": logits[None]}[action]

def student():
    return Student()

def narrow():
    return Student(3)

def broad():
    return Student(9)

def broken():
    return 1 // 0
"""


@pytest.fixture
def student_file(tmp_path: Path) -> Path:
    """The file that defines the students."""
    path = tmp_path / "students.py"
    path.write_text(STUDENT)
    return path


# reproducible runs
def test_a_run_is_the_same_again_and_another_with_another_seed(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    train(replace(config, out=tmp_path / "again", workers=2))
    assert same_weights(config.out, tmp_path / "again")
    assert metrics(config.out) == metrics(tmp_path / "again")
    train(replace(config, out=tmp_path / "other", seed=1))
    assert not same_weights(config.out, tmp_path / "other")


def test_the_baseline_is_a_run_of_its_own_at_alpha_0(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    views = dump(replace(dump_config, views=2, augment="shift:1", overwrite=True))
    config = replace(config, cache=views.path, eval_data=dump_config.eval_data)
    train(replace(config, baseline=True))
    train(replace(config, alpha=0.0, out=tmp_path / "alone"))
    assert same_weights(config.out / "baseline", tmp_path / "alone")
    assert metrics(config.out / "baseline") == metrics(tmp_path / "alone")
    assert not same_weights(config.out, tmp_path / "alone")


def test_alpha_0_is_training_on_labels_alone(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, alpha=0.0))
    train(replace(config, cache=None, out=tmp_path / "labels"))
    assert same_weights(config.out, tmp_path / "labels")


def test_augmentation_on_labels_alone_is_drawn_by_the_seed(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, cache=None)
    for name, augment in (("plain", None), ("moved", "shift:2"), ("again", "shift:2")):
        train(replace(config, augment=augment, out=tmp_path / name))
    assert same_weights(tmp_path / "moved", tmp_path / "again")
    assert not same_weights(tmp_path / "moved", tmp_path / "plain")


# the files of a run
def test_the_folder_holds_all_that_is_needed_to_use_the_student(
    config: TrainConfig, cache: Cache, data_file: Path
) -> None:
    config = replace(config, eval_data=f"npz:{data_file}@test", temperature=2.0)
    train(config)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "README.md",
        "config.json",
        "metrics.jsonl",
        "student.safetensors",
    ]
    facts = json.loads((config.out / "config.json").read_text())
    assert facts["content_ids"] == [cache.content_id()]
    assert facts["settings"]["cache"] == ["tiny.h5"]
    assert facts["settings"]["data"] == ["npz:tiny.npz@train"]
    assert (facts["name"], facts["alpha"], facts["parameters"]) == ("distilled", 1.0, 1125)
    assert facts["settings"]["temperature"] == 2.0
    model = build(
        facts["settings"]["student"], input_shape=facts["input_shape"], classes=facts["classes"]
    )
    model.load_state_dict(weights(config.out))
    evaluation = evaluate(
        model.eval(), open_source(f"npz:{data_file}@test"), CLASSES, torch.device("cpu")
    )
    assert (evaluation.errors, evaluation.samples) == (facts["errors"], facts["samples"])


def test_no_folder_of_this_machine_is_written(config: TrainConfig, data_file: Path) -> None:
    train(replace(config, eval_data=f"npz:{data_file}@test", baseline=True))
    for folder in (config.out, config.out / "baseline"):
        assert str(data_file.parent) not in (folder / "config.json").read_text()


def test_a_run_begins_with_the_weights_asked_for(
    config: TrainConfig, teacher_file: Path, tmp_path: Path
) -> None:
    train(replace(config, epochs=1))
    config_with_init = replace(
        config, init=config.out / "student.safetensors", out=tmp_path / "next"
    )
    train(replace(config_with_init, learning_rate=1e-12))
    for name, tensor in weights(config.out).items():
        torch.testing.assert_close(weights(tmp_path / "next")[name], tensor)
    with pytest.raises(
        ModelError, match=r"do not fit the model: 5\.weight is missing; .*3\.weight"
    ):
        train(replace(config_with_init, student="mlp:16,16", out=tmp_path / "misfit"))


# training needs no teacher
def test_it_trains_with_the_teachers_files_deleted(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    train(replace(config, cache=None, out=tmp_path / "teacher"))
    teacher = tmp_path / "teacher" / "student.safetensors"
    cache = dump(replace(dump_config, teacher="mlp:16", weights=teacher, out=tmp_path / "made.h5"))
    teacher.unlink()
    train(replace(config, cache=cache.path))
    assert soft(config.out)[-1] > 0


def test_no_code_of_the_teacher_is_imported(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    program = """
import json, sys
from softcache.cli.app import main
for arguments in map(json.loads, sys.argv[1:]):
    main(arguments, standalone_mode=False)
    print("loaded " + json.dumps([name for name in sys.modules if name.startswith("softcache")]))
"""
    data = ["--data", config.data[0]]
    commands = [
        [
            "train",
            str(config.caches[0]),
            "--student=mlp:4",
            "--epochs=1",
            f"--out={config.out}",
            *data,
        ],
        ["dump", f"--teacher={dump_config.teacher}", f"--out={tmp_path / 'again.h5'}", *data],
    ]
    arguments = [sys.executable, "-c", program, *map(json.dumps, commands)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    trained, dumped = (
        set(json.loads(line.removeprefix("loaded ")))
        for line in result.stdout.splitlines()
        if line.startswith("loaded ")
    )
    dumped = {re.sub("_models_[0-9a-f]{8}$", "_models", name) for name in dumped}
    teacher_modules = {"softcache.teachers.teacher", "softcache.dump.loop", "softcache_user_models"}
    assert "softcache.train.loop" in trained
    assert not {"softcache.teachers.teacher", "softcache.dump.loop"} & trained
    assert not any(name.startswith("softcache_user") for name in trained)
    assert teacher_modules <= dumped  # so the check above can fail
    # the untrained teacher is sure and wrong, and nothing else is said
    warnings = result.stderr.splitlines()
    assert warnings
    assert all(" the teacher agrees with 24.7% of the labels" in line for line in warnings)


# what stops a run
@pytest.fixture
def student_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, str], None]:
    """Make the student of student_file do something at its n-th step from now on; 0 means never."""

    def student_does(step: int, action: str) -> None:
        (tmp_path / "steps").unlink(missing_ok=True)
        monkeypatch.setenv("STUDENT_AT", str(step))
        monkeypatch.setenv("STUDENT_DOES", action)

    return student_does


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("raise", r"student raised ValueError on inputs \(64, 1, 8, 8\) of torch.float32: no more"),
        ("nan", r"distilled: the loss is nan at step 7 \(epoch 2\); lower --lr"),
        (
            "tuple",
            r"student returned tuple for a batch of 64; expected logits of shape \(64, classes\)",
        ),
        ("3-d", r"student returned \(1, 64, 5\) for a batch of 64; expected logits of shape"),
    ],
)
def test_a_student_that_fails_in_mid_run_stops_it(
    action: str,
    message: str,
    config: TrainConfig,
    student_file: Path,
    student_does: Callable[[int, str], None],
) -> None:
    student_does(7, action)
    with pytest.raises(ModelError, match=message):
        train(replace(config, student=f"{student_file}:student"))
    assert [line["step"] for line in metrics(config.out, UNFINISHED_METRICS)] == [5]
    assert sorted(path.name for path in config.out.iterdir()) == [NAME, UNFINISHED_METRICS]


def test_a_learning_rate_that_is_too_high_stops_with_the_step(config: TrainConfig) -> None:
    with pytest.raises(
        ModelError, match=r"distilled: the loss is (nan|inf) at step \d \(epoch 1\); lower --lr"
    ):
        train(replace(config, learning_rate=MAX_LEARNING_RATE, student="cnn:4,4", weight_decay=1e3))
    assert not (config.out / "student.safetensors").exists()


@contextmanager
def at_step(
    config: TrainConfig, student_file: Path, step: int, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """A training process that has reached a step, and sleeps there."""
    command = [sys.executable, "-c", IMPATIENT, "train", str(config.caches[0]), "--batch-size=64"]
    command += [
        f"--student={student_file}:student",
        f"--data={config.data[0]}",
        f"--out={config.out}",
    ]
    steps = student_file.with_name("steps")
    with subprocess.Popen(
        [*command, *options],
        env=os.environ | {"STUDENT_AT": str(step), "STUDENT_DOES": "sleep"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not steps.exists() or steps.stat().st_size < step:
            assert process.poll() is None, "the run ended before this step"
            time.sleep(0.005)
        yield process


def test_ctrl_c_stops_in_one_line_with_exit_code_130(
    config: TrainConfig, student_file: Path
) -> None:
    with at_step(config, student_file, 7) as process:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.startswith("temperature")
    assert len(output.splitlines()) == 1
    assert errors == "Error: stopped; the same command continues from the last checkpoint\n"
    assert [line["step"] for line in metrics(config.out, UNFINISHED_METRICS)] == [5]


def test_a_stopped_run_may_be_run_again(
    config: TrainConfig, student_file: Path, student_does: Callable[[int, str], None]
) -> None:
    config = replace(config, student=f"{student_file}:student")
    student_does(7, "interrupt")
    with pytest.raises(
        Interrupted, match=r"stopped; the same command continues from the last chec"
    ):
        train(config)
    student_does(0, "")
    train(config)
    assert [line["step"] for line in metrics(config.out)] == [5, 10]
    assert UNFINISHED_METRICS not in contents(config.out)


STOPS = {
    "raise": (ModelError, r"student raised ValueError"),
    "nan": (ModelError, r"the loss is nan at step 7"),
    "interrupt": (Interrupted, r"stopped; the same command continues from the last checkpoint"),
}


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("action", STOPS)
def test_an_overwriting_run_that_fails_keeps_the_finished_one_byte_for_byte(
    action: str,
    baseline: bool,
    config: TrainConfig,
    student_file: Path,
    student_does: Callable[[int, str], None],
) -> None:
    config = replace(config, student=f"{student_file}:student", baseline=baseline)
    folders = [config.out, *([config.out / "baseline"] if baseline else [])]
    student_does(0, "")
    train(config)
    names = ["config.json", "metrics.jsonl", "student.safetensors"]
    before = [{name: (folder / name).read_bytes() for name in names} for folder in folders]
    error, message = STOPS[action]
    # in the second epoch; the student and its baseline take turns
    student_does(13 if baseline else 7, action)
    with pytest.raises(error, match=message):
        train(replace(config, seed=1, overwrite=True))
    for folder, files in zip(folders, before, strict=True):
        assert {name: (folder / name).read_bytes() for name in names} == files
        assert [line["step"] for line in metrics(folder, UNFINISHED_METRICS)] == [5]
    student_does(0, "")
    train(replace(config, seed=1, overwrite=True))
    for folder, files in zip(folders, before, strict=True):
        assert not (folder / UNFINISHED_METRICS).exists()
        assert (folder / "student.safetensors").read_bytes() != files["student.safetensors"]
        assert (folder / "metrics.jsonl").read_bytes() != files["metrics.jsonl"]


def test_a_killed_overwriting_run_keeps_the_finished_one_byte_for_byte(
    config: TrainConfig, student_file: Path, tmp_path: Path
) -> None:
    train(replace(config, student=f"{student_file}:student"))
    before = contents(config.out)
    (tmp_path / "steps").unlink()
    with at_step(config, student_file, 7, "--overwrite", "--seed=1") as process:
        process.kill()
    after = contents(config.out)
    assert after.pop(UNFINISHED_METRICS)
    assert after.pop(NAME)
    assert after == before


# bad caches, folders and settings
def flip_a_bit(cache: Cache) -> None:
    raw = bytearray(cache.path.read_bytes())
    raw[cache.header.array("log_probs").offset + 1001] ^= 4
    cache.path.write_bytes(raw)


def test_a_damaged_cache_is_refused_before_the_first_step(
    config: TrainConfig, cache: Cache, student_file: Path, tmp_path: Path
) -> None:
    flip_a_bit(cache)
    config = replace(config, student=f"{student_file}:student")
    with pytest.raises(
        FormatError,
        match=r"is damaged: soft targets of samples 0 to 299 in view 0; softcache repair",
    ):
        train(config)
    assert not (tmp_path / "steps").exists()
    assert not config.out.exists()
    # without the check it is not refused
    train(replace(config, verify=False))
    assert (tmp_path / "steps").stat().st_size == 10


def test_an_unfinished_cache_is_refused(config: TrainConfig, cache: Cache) -> None:
    cache.path.rename(partial_path(cache.path))
    with pytest.raises(
        FormatError, match=r"tiny\.h5: its dump has not completed \(tiny\.h5\.partial"
    ):
        train(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0, "the file is empty, not a cache"), (70_000, "the file has 70,000 bytes, its header says")],
)
def test_a_cut_cache_is_refused(keep: int, message: str, config: TrainConfig, cache: Cache) -> None:
    cache.path.write_bytes(cache.path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=rf"tiny\.h5: {message}"):
        train(config)


def test_a_finished_run_is_kept(config: TrainConfig) -> None:
    train(config)
    before = contents(config.out)
    other = replace(config, seed=1)
    with pytest.raises(
        SettingsError, match=r"run holds a finished run \(student.safetensors\); give"
    ):
        train(other)
    assert contents(config.out) == before
    train(replace(other, overwrite=True))
    assert (config.out / "student.safetensors").read_bytes() != before["student.safetensors"]


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(
    config: TrainConfig, student_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "file" / "run"
    out.parent.write_text("")
    with pytest.raises(
        SettingsError, match=r"cannot write in .*file/run: .*/file is a file; give another --out"
    ):
        train(replace(config, student=f"{student_file}:student", out=out))
    assert not (tmp_path / "steps").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_folder_without_permission_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(
        SettingsError, match=r"cannot write in .*closed is not writable; give another --out"
    ):
        train(replace(config, out=tmp_path / "closed"))


@pytest.mark.parametrize("student", ["narrow", "broad"])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="distilled"),
        pytest.param(
            {"alpha": 0.0},
            id="alpha 0",
        ),
        pytest.param(
            {"cache": None},
            id="labels",
        ),
    ],
)
def test_a_student_of_another_width_is_refused(
    student: str, changes: dict[str, Any], config: TrainConfig, student_file: Path
) -> None:
    width = {"narrow": 3, "broad": 9}[student]
    with pytest.raises(
        ModelError, match=rf"student returned {width} outputs for 5 classes; expected one "
    ):
        train(replace(config, student=f"{student_file}:{student}", **changes))


def test_an_error_in_building_the_student_is_told(config: TrainConfig, student_file: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"students\.py:broken: the callable raised ZeroDivisionError: .* by zero",
    ):
        train(replace(config, student=f"{student_file}:broken"))


def test_evaluation_data_of_another_shape_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    images, labels = make_arrays()
    data = save_data(tmp_path, images[:, :, 1:], labels)
    with pytest.raises(SoftcacheError, match=r"1, 7, 8\)"):
        train(replace(config, eval_data=data))


def test_other_classes_than_the_caches_are_refused(config: TrainConfig) -> None:
    with pytest.raises(SettingsError, match=r"--classes is 7, but .*tiny\.h5 has 5 classes; leave"):
        train(replace(config, classes=7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1; expected a number from 0 to 1"),
        ({"alpha": 1.1}, "alpha is 1.1; expected a number from 0 to 1"),
        ({"alpha": float("nan")}, "alpha is nan; expected a number from 0 to 1"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf; expected a number above 0"),
        ({"learning_rate": 0.0}, "lr is 0.0; expected a number above 0"),
        ({"learning_rate": 2e6}, r"lr is 2000000\.0; expected a number above 0, up to 1,000,000"),
        ({"learning_rate": float("nan")}, "lr is nan; expected a number above 0"),
        ({"epochs": 0}, "epochs is 0; expected 1 or more"),
        ({"batch_size": 0}, "batch-size is 0; expected 1 or more"),
        ({"workers": -1}, "workers is -1; expected 0 or more"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"cache": None, "alpha": 0.5}, "--baseline need a CACHE of soft targets; name one"),
        ({"cache": None, "baseline": True}, "--baseline need a CACHE of soft targets; name one"),
        (
            {"weight_decay": -1.0},
            "weight-decay is -1.0; expected 0 or more",
        ),
        (
            {"cache": None, "classes": -1},
            "classes is -1; expected",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, config: TrainConfig
) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(config, **changes)

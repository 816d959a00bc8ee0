"""Training: what a student learns from a cache, and what stops it before it learns nonsense."""

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

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from softcache.cache import Cache
from softcache.cache.reader import partial_path
from softcache.data.augment import EXTRA_STREAM, parse_augment
from softcache.data.loader import ShuffledBatches
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import (
    DataError,
    FormatError,
    Interrupted,
    ModelError,
    SettingsError,
    SoftcacheError,
)
from softcache.losses import soft_loss
from softcache.models.build import build
from softcache.models.evaluate import evaluate
from softcache.targets.encode import soften
from softcache.targets.fetch import tempered_targets
from softcache.train.checkpoint import NAME
from softcache.train.config import MAX_LEARNING_RATE, TrainConfig, make_train_config
from softcache.train.loop import train
from softcache.train.run_folder import UNFINISHED_METRICS
from softcache.types import Views
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.configs import replace
from tests.conftest import CLASSES, SAMPLES, make_arrays

Targets = Callable[[int, npt.NDArray[np.int64]], Any]

NOTHING = 1e-4  # KL in nats: float16 targets leave less, one wrong sample much more

# a student that leaves a mark at every training step, and does at one what the environment says
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

    def act(self, logits, deed):
        if deed == "raise":
            raise ValueError("no more")
        if deed == "interrupt":
            raise KeyboardInterrupt
        if deed == "sleep":
            time.sleep(60)
        return {"nan": logits * torch.nan, "tuple": (logits, logits), "3-d": logits[None]}[deed]

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
    path = tmp_path / "students.py"
    path.write_text(STUDENT)
    return path


@pytest.fixture
def config(cache: Cache, data_file: Path, tmp_path: Path) -> TrainConfig:
    """A short run from the tiny cache, into tmp_path / run: 2 epochs of 5 steps."""
    return make_train_config(
        student="mlp:16",
        data=f"npz:{data_file}",
        out=tmp_path / "run",
        cache=cache.path,
        epochs=2,
        batch_size=64,
        device="cpu",
    )


def as_teacher(config: TrainConfig, teacher_file: Path) -> TrainConfig:
    """A run whose student is the teacher, and does not move.

    Its KL from the teacher is 0 in every epoch if the targets are those of the pixels that it sees,
    at the temperature of the loss.
    """
    return replace(config, student=f"{teacher_file}:teacher", learning_rate=1e-12)


def metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def soft(folder: Path) -> list[float]:
    """Mean KL from the teacher in each epoch."""
    return [line["soft"] for line in metrics(folder)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def save_data(folder: Path, images: npt.NDArray[Any], labels: npt.NDArray[Any] | None) -> str:
    """The specification of other data under the name of the tiny ones."""
    folder = folder / "changed"
    folder.mkdir(exist_ok=True)
    arrays = {"x_train": images} | ({} if labels is None else {"y_train": labels})
    np.savez(folder / "tiny.npz", **arrays)  # type: ignore[arg-type]
    return f"npz:{folder}/tiny.npz"


# what a student learns


def test_a_student_learns_from_labels_alone(config: TrainConfig, data_file: Path) -> None:
    test = f"npz:{data_file}@test"
    (learner,) = train(replace(config, cache=None, epochs=15, learning_rate=0.01, eval_data=test))
    assert learner.evaluation is not None
    assert learner.evaluation.errors <= 5  # of 100; by chance, 80
    lines = metrics(config.out)
    assert [line["epoch"] for line in lines] == list(range(1, 16))
    assert [line["step"] for line in lines] == list(range(5, 80, 5))
    assert [line["soft"] for line in lines] == [0.0] * 15
    assert lines[-1]["errors"] == learner.evaluation.errors


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
    student, twin = train(replace(config, student="mlp:16", cache=trained.path, baseline=True))
    assert student.evaluation is not None
    assert twin.evaluation is not None
    errors = trained.header.evaluation["errors"]
    assert student.evaluation.errors <= errors + 10  # of 100
    assert soft(config.out)[-1] < soft(config.out)[0] / 2
    table = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert [row[:4] for row in table[2:]] == [
        ["teacher", "4,485", "100.0%", f"{errors} of 100"],
        ["distilled", "1,125", "25.1%", f"{student.evaluation.errors} of 100"],
        ["hard labels", "1,125", "25.1%", f"{twin.evaluation.errors} of 100"],
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
        row = re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[2])
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
        def targets(view: Views, rows: npt.NDArray[np.int64]) -> dict[float, Tensor]:
            with torch.no_grad():
                logits: Tensor = teacher(to_float(source.fetch(rows.tolist())[0]))
            return {t: soften(logits, t) for t in temperatures}

        return targets

    monkeypatch.setattr("softcache.join.match.tempered_targets", live)
    train(replace(config, out=tmp_path / "live"))
    from_cache, from_teacher = metrics(config.out), metrics(tmp_path / "live")
    assert len(from_cache) * 5 == 100  # steps
    for one, other in zip(from_cache, from_teacher, strict=True):
        assert one["total"] == pytest.approx(other["total"], rel=1e-3)
    assert not same_weights(config.out, tmp_path / "live")  # it was another source of targets


# the right target for every sample


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
    # targets as stored would show
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

    def exchanged(*arguments: Any) -> Targets:
        targets = tempered_targets(*arguments)
        return lambda view, rows: targets(1 - view, rows)

    monkeypatch.setattr("softcache.join.match.tempered_targets", exchanged)
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
    assert capsys.readouterr().out.startswith(
        "note: npz:tiny.npz@train is in another order than the cache (first at sample "
        f"{int(np.flatnonzero(order != np.arange(SAMPLES))[0])}); joined by content\n"
    )

    def by_place(*arguments: Any) -> Targets:
        targets = tempered_targets(*arguments)
        return lambda view, rows: targets(view, np.argsort(order)[rows])

    monkeypatch.setattr("softcache.join.match.tempered_targets", by_place)
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
        ("cut", r"tiny\.npz@train has 299 samples, .*tiny\.h5 was made from 300 of npz:tiny"),
        (
            "pixel",
            r"sample 10 of npz:tiny\.npz@train is not in .*tiny\.h5, .* \(1 samples differ\)",
        ),
        (
            "label",
            r"sample 10 of npz:tiny\.npz@train has label \d, and \d in .*tiny\.h5 \(1 labels",
        ),
        (
            "type",
            r"sample 0 of npz:tiny\.npz@train is not in .*tiny\.h5, .* \(300 samples differ\)",
        ),
    ],
)
def test_other_data_are_refused_before_a_folder_is_made(
    change: str, message: str, config: TrainConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    if change == "cut":
        images, labels = images[:-1], labels[:-1]
    elif change == "pixel":
        images[10, 0, 0, 0] ^= 1
    elif change == "label":
        labels[10] = (labels[10] + 1) % CLASSES
    else:
        images = images.astype(np.float32)
    with pytest.raises(DataError, match=message):
        train(replace(config, data=save_data(tmp_path, images, labels)))
    assert not config.out.exists()


# views: the student sees what the teacher saw

FEW = 60  # samples; a callable of one's own is called for each

# a teacher and a student that write down every input, and augmentation that draws from all there is
RECORDERS = """
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

class Recorder(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.file = Path(__file__).with_name(name)
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(64, 5, generator=generator))

    def forward(self, x):
        if len(x) > 1:  # not on the one sample on which a teacher is tried
            with self.file.open("ab") as file:
                file.write(x.detach().numpy().tobytes())
        return x.flatten(1) @ self.weight

def teacher():
    return Recorder("teacher.f4")

def student():
    return Recorder("student.f4")

def own(image):
    image = image.clone()
    image[:, random.randrange(8)] = int(np.random.randint(256))
    return torch.where(torch.rand(image.shape) < 0.1, 255 - image, image)

def other(image):
    return 255 - image
"""


@pytest.fixture
def recorders(tmp_path: Path) -> Path:
    """The file of the recorders, and few.npz beside it."""
    images, labels = make_arrays(FEW)
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels)
    path = tmp_path / "recorders.py"
    path.write_text(RECORDERS)
    return path


def seen_by(name: str, recorders: Path, epochs: int) -> npt.NDArray[np.float32]:
    """The inputs of the first epochs or views, (epochs, FEW, 64), in the order they came."""
    found = np.fromfile(recorders.with_name(f"{name}.f4"), np.float32)
    return found.reshape(-1, 64)[: epochs * FEW].reshape(epochs, FEW, 64)


def order_of(config: TrainConfig, epoch: int) -> npt.NDArray[np.int64]:
    """The rows of the cache in the order of an epoch."""
    batches = ShuffledBatches(FEW, config.batch_size, config.seed)
    batches.set_epoch(epoch)
    return np.concatenate([request.source_indices for request in batches])


def views_of(
    dump_config: DumpConfig, recorders: Path, augment: str | None, **changes: Any
) -> Cache:
    """A cache of 3 views by the teacher that writes down what it sees."""
    usual: dict[str, Any] = {"views": 3, "augment": augment, "seed": 5, "batch_size": 25}
    usual |= {"teacher": f"{recorders}:teacher", "data": f"npz:{recorders.parent}/few.npz"}
    return dump(replace(dump_config, eval_data=None, overwrite=True, **usual | changes))


def as_recorder(config: TrainConfig, recorders: Path, cache: Cache, **changes: Any) -> TrainConfig:
    """A run of a student that is the teacher, and does not move; 4 epochs, so that a view recurs.

    In an epoch it sees all samples in one view.
    """
    usual: dict[str, Any] = {"cache": cache.path, "epochs": 4, "seed": 1, "batch_size": 16}
    usual |= {"learning_rate": 1e-12, "rotate": False}
    usual |= {"student": f"{recorders}:student", "data": f"npz:{recorders.parent}/few.npz"}
    return replace(config, **usual | changes)


@pytest.fixture(params=["in order", "reordered"])
def reordered(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Training data in the order of the dump, and in another."""
    if request.param == "in order":
        return f"npz:{tmp_path}/few.npz"
    images, labels = make_arrays(FEW)
    order = np.random.default_rng(3).permutation(FEW)
    return save_data(tmp_path, images[order], labels[order])


# the last bits may differ with a sample's place in its batch where vector units take several at once
REPLAYED: dict[str, float] = {
    "shift:2,flip": 0.0,
    "crop:0.5,jitter:0.4,cutout:3": 1e-5,
    "shift:1,mixup": 1e-6,
    "OWN,flip,mixup": 1e-6,
}


@pytest.mark.parametrize("augment", REPLAYED)
def test_the_student_sees_in_each_epoch_what_the_teacher_saw_in_its_view(
    augment: str,
    reordered: str,
    config: TrainConfig,
    dump_config: DumpConfig,
    recorders: Path,
) -> None:
    spec = augment.replace("OWN", f"{recorders}:own")
    cache = views_of(dump_config, recorders, spec)
    own = spec if ".py:" in spec else None
    config = as_recorder(config, recorders, cache, data=reordered, augment=own)
    train(config)
    views = seen_by("teacher", recorders, 3)
    for epoch, inputs in enumerate(seen_by("student", recorders, 4)):
        samples = order_of(config, epoch)
        expected = views[epoch % 3][samples]
        np.testing.assert_allclose(inputs, expected, rtol=0, atol=REPLAYED[augment])
        # another view in its place would show in nearly every sample
        wrong = np.abs(inputs - views[(epoch + 1) % 3][samples]).max(1)
        assert (wrong > 0.01).mean() > 0.8
    assert max(soft(config.out)) < NOTHING  # and each input came with its own target


@pytest.mark.parametrize("augment", ["shift:2,flip", "OWN,shift:1,mixup"])
def test_rotated_every_sample_is_seen_in_all_views_in_turn_and_an_epoch_mixes_them(
    augment: str, reordered: str, config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    spec = augment.replace("OWN", f"{recorders}:own")
    cache = views_of(dump_config, recorders, spec)
    own = spec if ".py:" in spec else None
    config = as_recorder(config, recorders, cache, data=reordered, augment=own, rotate=True)
    train(config)
    views = seen_by("teacher", recorders, 3)
    found = np.empty((4, FEW), np.int64)  # the view of each sample in each epoch
    for epoch, inputs in enumerate(seen_by("student", recorders, 4)):
        samples = order_of(config, epoch)
        off = np.abs(views[:, samples] - inputs).max(-1)  # (views, FEW)
        found[epoch, samples] = off.argmin(0)
        assert off.min(0).max() <= 1e-6  # what the teacher saw in one of the views,
        assert (np.sort(off, 0)[1] > 0.01).mean() > 0.8  # and not in another
    told = np.sort(np.abs(views[:, None] - views).max(-1).reshape(9, FEW), 0)[3] > 0.01
    assert told.mean() > 0.8  # of the others two views are the same, by chance
    turns = found[:, told]
    assert ((turns[1:] - turns[:-1]) % 3 == 1).all()  # in turn, and from the beginning again
    assert (np.bincount(turns[0], minlength=3) > FEW / 6).all()
    assert max(soft(config.out)) < NOTHING  # and each input came with its own target


def test_a_run_is_the_same_whatever_the_order_of_the_data(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path, tmp_path: Path
) -> None:
    cache = views_of(dump_config, recorders, "shift:2,mixup")
    images, labels = make_arrays(FEW)
    order = np.random.default_rng(3).permutation(FEW)
    config = replace(config, cache=cache.path, epochs=4, batch_size=16)
    train(replace(config, data=f"npz:{tmp_path}/few.npz"))
    other = save_data(tmp_path, images[order], labels[order])
    train(replace(config, data=other, out=tmp_path / "other"))
    assert same_weights(config.out, tmp_path / "other")
    assert metrics(config.out) == metrics(tmp_path / "other")
    # another order of the samples would show
    train(replace(config, data=other, seed=1, out=tmp_path / "shuffled"))
    assert not same_weights(config.out, tmp_path / "shuffled")


def test_processes_that_load_replay_the_same(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    spec = f"{recorders}:own,shift:1,mixup"
    cache = views_of(dump_config, recorders, spec, workers=1)
    config = as_recorder(config, recorders, cache, augment=spec, epochs=2, workers=2)
    train(config)
    views = seen_by("teacher", recorders, 2)
    for epoch, inputs in enumerate(seen_by("student", recorders, 2)):
        expected = views[epoch][order_of(config, epoch)]
        np.testing.assert_allclose(inputs, expected, rtol=0, atol=1e-6)
    assert max(soft(config.out)) < NOTHING


def test_a_cut_of_the_views_would_be_noticed(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = views_of(dump_config, recorders, "shift:2")
    # as if the student drew its views with another seed than the cache's
    monkeypatch.setattr(
        "softcache.join.match.replayed",
        lambda header, own: parse_augment(header.augment, seed=header.seed + 1, total=FEW),
    )
    config = as_recorder(config, recorders, cache)
    with pytest.raises(
        DataError,
        match=r"sample 0 of npz:few\.npz@train in view 0 is not what the teacher of .*tiny\.h5 saw "
        r"\(its fingerprint is off by .*\): .*; no library version differs",
    ):
        train(config)
    assert not config.out.exists()


# mixup


def test_mixup_from_dump_to_student_mixes_pixels_targets_and_labels(
    reordered: str, config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    cache = views_of(dump_config, recorders, "mixup")
    config = as_recorder(config, recorders, cache, data=reordered, batch_size=FEW, alpha=0.9)
    train(replace(config, epochs=3))
    images, labels = make_arrays(FEW)
    pixels = torch.from_numpy(images).flatten(1).float() / 255
    everyone = np.arange(FEW)
    mix = parse_augment("mixup", seed=5, total=FEW)
    weight = import_callable(f"{recorders}:teacher", what="teacher")().weight.detach()
    for line, view in zip(metrics(config.out), range(3), strict=True):
        partners, shares = mix.partners(view, everyone), mix.shares(view, everyone)
        assert partners is not None
        assert (partners != everyone).mean() > 0.9
        share = torch.from_numpy(shares).float()
        mixed = pixels * (1 - share[:, None]) + pixels[partners] * share[:, None]
        np.testing.assert_allclose(seen_by("teacher", recorders, 3)[view], mixed, atol=1e-6)
        logits = mixed @ weight
        np.testing.assert_allclose(
            cache.rows(view, everyone), soften(logits, 4.0), rtol=2**-10, atol=1e-3
        )
        own, theirs = (
            functional.cross_entropy(logits, torch.from_numpy(y), reduction="none")
            for y in (labels, labels[partners])
        )
        hard = float((own * (1 - share) + theirs * share).mean())
        assert line["hard"] == pytest.approx(hard, rel=1e-4)
        assert abs(hard - float(own.mean())) > 0.01  # labels of the samples alone would show
        assert line["soft"] < NOTHING
        assert line["total"] == pytest.approx(0.9 * 16 * line["soft"] + 0.1 * hard, rel=1e-4)


def test_a_mixed_sample_without_both_labels_takes_no_part_in_the_cross_entropy(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path, tmp_path: Path
) -> None:
    images, labels = make_arrays(FEW)
    labels[::3] = -1
    data = save_data(tmp_path, images, labels)
    cache = views_of(dump_config, recorders, "mixup", data=data)
    config = as_recorder(config, recorders, cache, data=data, batch_size=FEW)
    train(replace(config, epochs=1))
    mix, everyone = parse_augment("mixup", seed=5, total=FEW), np.arange(FEW)
    partners, shares = mix.partners(0, everyone), mix.shares(0, everyone)
    assert partners is not None
    weight = import_callable(f"{recorders}:teacher", what="teacher")().weight.detach()
    log_probs = (torch.from_numpy(seen_by("teacher", recorders, 1)[0]) @ weight).log_softmax(-1)
    losses = -(1 - shares) * log_probs[everyone, labels].numpy()
    losses -= shares * log_probs[everyone, labels[partners]].numpy()
    both = (labels >= 0) & (labels[partners] >= 0)
    assert 0 < both.sum() < (labels >= 0).sum()
    assert metrics(config.out)[0]["hard"] == pytest.approx(losses[both].mean(), rel=1e-4)


def test_a_student_learns_from_mixed_samples(config: TrainConfig, dump_config: DumpConfig) -> None:
    mixed = dump(replace(dump_config, views=3, augment="shift:1,mixup", overwrite=True))
    config = replace(config, cache=mixed.path, epochs=12, learning_rate=0.01, alpha=0.9)
    train(replace(config, baseline=True))
    for folder in (config.out, config.out / "baseline"):
        totals = [line["total"] for line in metrics(folder)]
        assert totals[-1] < 0.9 * totals[0]


# whose augmentation


def test_code_that_a_cache_names_is_not_run_by_itself(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    cache = views_of(dump_config, recorders, f"{recorders}:own,flip")
    assert cache.header.augment == "recorders.py:own,flip"
    config = as_recorder(config, recorders, cache)
    with pytest.raises(
        SettingsError,
        match=r"augmented by recorders\.py:own,flip; give that file with --augment, code named in a "
        "cache is never run by itself",
    ):
        train(config)
    for wrong in (f"{recorders}:own", f"{recorders}:other,flip", "flip"):
        with pytest.raises(
            SettingsError,
            match=rf"--augment {re.escape(wrong)} is not the cache's own \(recorders\.py:own,flip\): "
            ".*; leave it out, or add it on top by --extra-augment",
        ):
            train(replace(config, augment=wrong))
    assert not config.out.exists()


def test_code_that_has_changed_since_the_dump_is_refused(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    spec = f"{recorders}:own"
    config = as_recorder(
        config, recorders, views_of(dump_config, recorders, spec), augment=spec, epochs=1
    )
    train(config)
    recorders.write_text(RECORDERS.replace("< 0.1", "< 0.2"))
    with pytest.raises(
        DataError, match=r"is not what the teacher of .* the data's own transform has"
    ):
        train(replace(config, overwrite=True))
    assert (config.out / "student.safetensors").exists()


@pytest.mark.parametrize("own", [None, "shift:2"])
@pytest.mark.parametrize("wrong", ["flip", "shift:1", "shift:2,flip", "mixup"])
def test_another_augmentation_than_the_caches_is_refused_before_a_folder_is_made(
    own: str | None, wrong: str, config: TrainConfig, dump_config: DumpConfig
) -> None:
    dump(replace(dump_config, augment=own, eval_data=None, overwrite=True))
    with pytest.raises(
        SettingsError,
        match=rf"--augment {wrong} is not the cache's own \({own or 'none'}\): it would change the "
        "pixels that the cached targets belong to; leave it out, or add it on top by --extra-augment",
    ):
        train(replace(config, augment=wrong))
    assert not config.out.exists()


def test_the_caches_own_augmentation_may_be_named_again(
    config: TrainConfig, dump_config: DumpConfig, teacher_file: Path
) -> None:
    dump(replace(dump_config, views=2, augment="shift:2", overwrite=True))
    train(replace(as_teacher(config, teacher_file), augment="shift:2"))
    assert max(soft(config.out)) < NOTHING


@pytest.mark.parametrize("own", [None, "shift:1"])
def test_extra_augmentation_comes_on_top_of_the_view_that_the_teacher_saw(
    own: str | None, config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    cache = views_of(dump_config, recorders, own, views=3 if own else 1)
    config = as_recorder(config, recorders, cache, extra_augment="flip,cutout:3")
    train(config)
    views = seen_by("teacher", recorders, cache.header.views)
    extra = parse_augment("flip,cutout:3", seed=config.seed, total=FEW)
    for epoch, inputs in enumerate(seen_by("student", recorders, 4)):
        order = order_of(config, epoch)
        view = torch.from_numpy(views[epoch % len(views)][order]).view(-1, 1, 8, 8)
        # a stream of its own, or it would repeat what the cache's augmentation drew
        expected = extra(view, None, epoch, order, first_stream=EXTRA_STREAM)
        np.testing.assert_array_equal(inputs, expected.flatten(1))
    # the targets are still those of the view without it
    assert min(soft(config.out)) > 100 * NOTHING
    facts = json.loads((config.out / "config.json").read_text())
    assert facts["settings"]["extra_augment"] == "flip,cutout:3"


def test_extra_augmentation_is_the_same_whatever_the_order_of_the_data(
    config: TrainConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    config = replace(config, extra_augment="shift:1")
    train(config)
    data = save_data(tmp_path, images[::-1], labels[::-1])
    train(replace(config, data=data, out=tmp_path / "other"))
    assert same_weights(config.out, tmp_path / "other")


@pytest.mark.parametrize("extra", ["mixup", "OWN"])
def test_extra_augmentation_that_needs_the_loader_is_refused(
    extra: str, config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    extra = extra.replace("OWN", f"{recorders}:other")
    config = as_recorder(
        config,
        recorders,
        views_of(dump_config, recorders, None, views=1),
        extra_augment=extra,
    )
    with pytest.raises(
        SettingsError,
        match=rf"--extra-augment {re.escape(extra)}: only the built-in operations can go on top; "
        r".* belong into softcache dump --augment",
    ):
        train(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_augment": "swirl"},
        {"student": "swirl:3"},
        {"student": "nowhere.py:student"},
        {"classes": 7},
        {"init": Path("nowhere.safetensors")},
    ],
    ids=["extra augment", "student", "student's file", "classes", "init"],
)
def test_a_mistake_in_an_overwriting_command_does_not_cost_the_finished_run(
    changes: dict[str, Any], config: TrainConfig
) -> None:
    train(replace(config, epochs=1))
    before = contents(config.out)
    with pytest.raises(SoftcacheError, match=r"swirl|nowhere|--classes is 7"):
        train(replace(config, overwrite=True, **changes))
    assert contents(config.out) == before
    fresh = config.out.parent / "fresh"
    with pytest.raises(SoftcacheError, match=r"swirl|nowhere|--classes is 7"):
        train(replace(config, out=fresh, **changes))
    assert not fresh.exists()


def test_a_bad_label_in_an_overwriting_command_does_not_cost_the_finished_run(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(config, epochs=1))
    before = contents(config.out)
    images, labels = make_arrays()
    labels[200] = 7
    with pytest.raises(DataError, match="sample 200 has label 7; expected 0 to 4"):
        train(replace(config, data=save_data(tmp_path, images, labels), overwrite=True))
    assert contents(config.out) == before


# labels


def test_unlabelled_samples_take_no_part_in_the_cross_entropy(
    config: TrainConfig, teacher_file: Path, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    labels[::3] = -1
    config = replace(
        as_teacher(config, teacher_file),
        data=save_data(tmp_path, images, labels),
        batch_size=SAMPLES,
        epochs=1,
    )
    train(config)
    teacher = import_callable(f"{teacher_file}:teacher", what="teacher")()
    logits = teacher(to_float(torch.from_numpy(images)))[labels >= 0]
    expected = functional.cross_entropy(logits, torch.from_numpy(labels[labels >= 0]))
    assert metrics(config.out)[0]["hard"] == pytest.approx(expected.item(), rel=1e-5)


def test_data_without_any_label_train_on_the_soft_targets(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(replace(config, data=save_data(tmp_path, make_arrays()[0], None), epochs=15))
    lines = metrics(config.out)
    assert {line["hard"] for line in lines} == {0.0}
    assert lines[-1]["soft"] < 0.8 * lines[0]["soft"]


def test_at_alpha_1_labels_play_no_part(config: TrainConfig, tmp_path: Path) -> None:
    unlabelled = save_data(tmp_path, make_arrays()[0], None)
    for alpha, same in ((1.0, True), (0.9, False)):
        config = replace(config, alpha=alpha, overwrite=True)
        train(config)
        train(replace(config, data=unlabelled, out=tmp_path / "unlabelled"))
        assert same_weights(config.out, tmp_path / "unlabelled") is same


def test_a_label_out_of_range_is_named(config: TrainConfig, tmp_path: Path) -> None:
    images, labels = make_arrays()
    labels[200] = 7
    data = save_data(tmp_path, images, labels)
    with pytest.raises(DataError, match="sample 200 has label 7; expected 0 to 4, or -1 for none"):
        train(replace(config, cache=None, data=data, classes=CLASSES))


def test_data_that_do_not_say_their_classes_are_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    data = save_data(tmp_path, make_arrays()[0], None)
    with pytest.raises(SettingsError, match="does not say how many classes it has; add --classes"):
        train(replace(config, cache=None, data=data))


def test_a_label_out_of_range_in_the_evaluation_data_is_named(
    config: TrainConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    labels[20] = 9
    with pytest.raises(DataError, match="sample 20 has label 9; expected 0 to 4"):
        train(replace(config, eval_data=save_data(tmp_path, images, labels)))


# the same again


def test_a_run_is_the_same_again_and_another_with_another_seed(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    train(replace(config, out=tmp_path / "again", workers=2))
    assert same_weights(config.out, tmp_path / "again")
    assert metrics(config.out) == metrics(tmp_path / "again")
    train(replace(config, out=tmp_path / "other", seed=1))
    assert not same_weights(config.out, tmp_path / "other")


def test_the_twin_is_a_run_of_its_own_at_alpha_0(
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


# what a run leaves


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
    assert (facts["name"], facts["alpha"], facts["parameters"]) == ("distilled", 0.9, 1125)
    assert facts["settings"]["temperature"] == 2.0
    model = build(
        facts["settings"]["student"], input_shape=facts["input_shape"], classes=facts["classes"]
    )
    model.load_state_dict(weights(config.out))
    found = evaluate(
        model.eval(), open_source(f"npz:{data_file}@test"), CLASSES, torch.device("cpu")
    )
    assert (found.errors, found.samples) == (facts["errors"], facts["samples"])


def test_no_folder_of_this_machine_is_written(config: TrainConfig, data_file: Path) -> None:
    train(replace(config, eval_data=f"npz:{data_file}@test", baseline=True))
    for folder in (config.out, config.out / "baseline"):
        assert str(data_file.parent) not in (folder / "config.json").read_text()


def test_a_run_begins_with_the_weights_asked_for(
    config: TrainConfig, teacher_file: Path, tmp_path: Path
) -> None:
    train(replace(config, epochs=1))
    begun = replace(config, init=config.out / "student.safetensors", out=tmp_path / "next")
    train(replace(begun, learning_rate=1e-12))
    for name, tensor in weights(config.out).items():
        torch.testing.assert_close(weights(tmp_path / "next")[name], tensor)
    with pytest.raises(
        ModelError, match=r"do not fit the model: 5\.weight is missing; .*3\.weight"
    ):
        train(replace(begun, student="mlp:16,16", out=tmp_path / "misfit"))


# the teacher is not here


def test_it_trains_with_the_teachers_files_deleted(
    config: TrainConfig, dump_config: DumpConfig, tmp_path: Path
) -> None:
    train(replace(config, cache=None, out=tmp_path / "teacher"))
    teacher = tmp_path / "teacher" / "student.safetensors"
    made = dump(replace(dump_config, teacher="mlp:16", weights=teacher, out=tmp_path / "made.h5"))
    teacher.unlink()
    train(replace(config, cache=made.path))
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
        ["dump", f"--teacher={dump_config.teacher}", f"--out={tmp_path / 'twin.h5'}", *data],
    ]
    arguments = [sys.executable, "-c", program, *map(json.dumps, commands)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    trained, dumped = (
        set(json.loads(line.removeprefix("loaded ")))
        for line in done.stdout.splitlines()
        if line.startswith("loaded ")
    )
    dumped = {re.sub("_models_[0-9a-f]{8}$", "_models", name) for name in dumped}
    of_teacher = {"softcache.teachers.teacher", "softcache.dump.loop", "softcache_user_models"}
    assert "softcache.train.loop" in trained
    assert not {"softcache.teachers.teacher", "softcache.dump.loop"} & trained
    assert not any(name.startswith("softcache_user") for name in trained)
    assert of_teacher <= dumped  # so the check would notice
    assert done.stderr == ""


# what stops a run


@pytest.fixture
def student_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, str], None]:
    """Let the student of student_file do something at its n-th step from now on; 0: never."""

    def student_does(step: int, deed: str) -> None:
        (tmp_path / "steps").unlink(missing_ok=True)
        monkeypatch.setenv("STUDENT_AT", str(step))
        monkeypatch.setenv("STUDENT_DOES", deed)

    return student_does


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("raise", r"student raised ValueError on inputs \(64, 1, 8, 8\) of torch.float32: no more"),
        ("nan", r"distilled: the loss is nan at step 7 \(epoch 2\); lower --lr"),
        (
            "tuple",
            r"student gives tuple for a batch of 64; expected logits of shape \(64, classes\)",
        ),
        ("3-d", r"student gives \(1, 64, 5\) for a batch of 64; expected logits of shape"),
    ],
)
def test_a_student_that_fails_in_mid_run_stops_it(
    deed: str,
    message: str,
    config: TrainConfig,
    student_file: Path,
    student_does: Callable[[int, str], None],
) -> None:
    student_does(7, deed)
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
    """A process that trains, and sleeps at a step."""
    command = [sys.executable, "-m", "softcache", "train", str(config.caches[0]), "--batch-size=64"]
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
            assert process.poll() is None, "the run ended before its time"
            time.sleep(0.005)
        yield process


def test_ctrl_c_stops_in_one_line_with_exit_code_130(
    config: TrainConfig, student_file: Path
) -> None:
    with at_step(config, student_file, 7) as process:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
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
@pytest.mark.parametrize("deed", STOPS)
def test_an_overwriting_run_that_fails_keeps_the_finished_one_byte_for_byte(
    deed: str,
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
    error, message = STOPS[deed]
    # in the second epoch; two learners take turns
    student_does(13 if baseline else 7, deed)
    with pytest.raises(error, match=message):
        train(replace(config, seed=1, overwrite=True))
    for folder, kept in zip(folders, before, strict=True):
        assert {name: (folder / name).read_bytes() for name in names} == kept
        assert [line["step"] for line in metrics(folder, UNFINISHED_METRICS)] == [5]
    student_does(0, "")
    train(replace(config, seed=1, overwrite=True))
    for folder, kept in zip(folders, before, strict=True):
        assert not (folder / UNFINISHED_METRICS).exists()
        assert (folder / "student.safetensors").read_bytes() != kept["student.safetensors"]
        assert (folder / "metrics.jsonl").read_bytes() != kept["metrics.jsonl"]


def test_a_killed_overwriting_run_keeps_the_finished_one_byte_for_byte(
    config: TrainConfig, student_file: Path, tmp_path: Path
) -> None:
    train(replace(config, student=f"{student_file}:student"))
    before = contents(config.out)
    (tmp_path / "steps").unlink()
    with at_step(config, student_file, 7, "--overwrite", "--seed=1") as process:
        process.kill()
    found = contents(config.out)
    assert found.pop(UNFINISHED_METRICS)
    assert found.pop(NAME)
    assert found == before


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
    # it was the check that refused it
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(
        SettingsError, match=r"cannot write in .*closed cannot be written; give another --out"
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
        ModelError, match=rf"student gives {width} outputs for 5 classes; it needs one "
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

"""Training on views: the student sees what the teacher saw, with its targets and labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from softcache.cache import Cache
from softcache.data.augment import EXTRA_STREAM, parse_augment
from softcache.data.loader import ShuffledBatches
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, SettingsError, SoftcacheError
from softcache.targets.encode import soften
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.configs import replace
from tests.conftest import CLASSES, SAMPLES, make_arrays
from tests.train.loop_cases import (
    NOTHING,
    as_teacher,
    contents,
    metrics,
    same_weights,
    save_data,
    soft,
)

FEW = 60  # samples, since a user's callable is called for each

# a teacher and a student that record every input, and an augmentation that draws from all generators
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
        if len(x) > 1:  # skips the single sample that a teacher is first tried on
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
    """The file that defines the recorders, with few.npz next to it."""
    images, labels = make_arrays(FEW)
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels)
    path = tmp_path / "recorders.py"
    path.write_text(RECORDERS)
    return path


def seen_by(name: str, recorders: Path, epochs: int) -> npt.NDArray[np.float32]:
    """The inputs of the first epochs or views, (epochs, FEW, 64), in the order they were seen."""
    inputs = np.fromfile(recorders.with_name(f"{name}.f4"), np.float32)
    return inputs.reshape(-1, 64)[: epochs * FEW].reshape(epochs, FEW, 64)


def order_of(config: TrainConfig, epoch: int) -> npt.NDArray[np.int64]:
    """The cache rows (FEW,) in the order of an epoch."""
    batches = ShuffledBatches(FEW, config.batch_size, config.seed)
    batches.set_epoch(epoch)
    return np.concatenate([request.source_indices for request in batches])


def views_of(
    dump_config: DumpConfig, recorders: Path, augment: str | None, **changes: Any
) -> Cache:
    """A cache of 3 views, dumped by the teacher that records its inputs."""
    settings: dict[str, Any] = {"views": 3, "augment": augment, "seed": 5, "batch_size": 25}
    settings |= {"teacher": f"{recorders}:teacher", "data": f"npz:{recorders.parent}/few.npz"}
    return dump(replace(dump_config, eval_data=None, overwrite=True, **settings | changes))


def as_recorder(config: TrainConfig, recorders: Path, cache: Cache, **changes: Any) -> TrainConfig:
    """A run in which the teacher is the student, and stays unchanged; 4 epochs, so that a view recurs.

    In each epoch it sees all samples in a single view.
    """
    settings: dict[str, Any] = {"cache": cache.path, "epochs": 4, "seed": 1, "batch_size": 16}
    settings |= {"learning_rate": 1e-12, "rotate": False}
    settings |= {"student": f"{recorders}:student", "data": f"npz:{recorders.parent}/few.npz"}
    return replace(config, **settings | changes)


@pytest.fixture(params=["in order", "reordered"])
def reordered(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Training data in the order of the dump, and in another order."""
    if request.param == "in order":
        return f"npz:{tmp_path}/few.npz"
    images, labels = make_arrays(FEW)
    order = np.random.default_rng(3).permutation(FEW)
    return save_data(tmp_path, images[order], labels[order])


# vectorized arithmetic can change the last bits with a sample's position in its batch
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
    callable_spec = spec if ".py:" in spec else None
    config = as_recorder(config, recorders, cache, data=reordered, augment=callable_spec)
    train(config)
    views = seen_by("teacher", recorders, 3)
    for epoch, inputs in enumerate(seen_by("student", recorders, 4)):
        order = order_of(config, epoch)
        expected = views[epoch % 3][order]
        np.testing.assert_allclose(inputs, expected, rtol=0, atol=REPLAYED[augment])
        # another view would differ in nearly every sample
        difference = np.abs(inputs - views[(epoch + 1) % 3][order]).max(1)
        assert (difference > 0.01).mean() > 0.8
    assert max(soft(config.out)) < NOTHING  # and each input came with its own soft targets


@pytest.mark.parametrize("augment", ["shift:2,flip", "OWN,shift:1,mixup"])
def test_rotated_every_sample_is_seen_in_all_views_in_turn_and_an_epoch_mixes_them(
    augment: str, reordered: str, config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    spec = augment.replace("OWN", f"{recorders}:own")
    cache = views_of(dump_config, recorders, spec)
    callable_spec = spec if ".py:" in spec else None
    config = as_recorder(
        config, recorders, cache, data=reordered, augment=callable_spec, rotate=True
    )
    train(config)
    views = seen_by("teacher", recorders, 3)
    view_of = np.empty((4, FEW), np.int64)  # by epoch and cache row
    for epoch, inputs in enumerate(seen_by("student", recorders, 4)):
        order = order_of(config, epoch)
        difference = np.abs(views[:, order] - inputs).max(-1)  # (views, FEW)
        view_of[epoch, order] = difference.argmin(0)
        assert difference.min(0).max() <= 1e-6  # what the teacher saw in one of the views,
        assert (np.sort(difference, 0)[1] > 0.01).mean() > 0.8  # and not in another
    has_distinct_views = (
        np.sort(np.abs(views[:, None] - views).max(-1).reshape(9, FEW), 0)[3] > 0.01
    )
    assert has_distinct_views.mean() > 0.8  # by chance, other samples have two equal views
    turns = view_of[:, has_distinct_views]
    assert ((turns[1:] - turns[:-1]) % 3 == 1).all()  # one view after another, then the first again
    assert (np.bincount(turns[0], minlength=3) > FEW / 6).all()
    assert max(soft(config.out)) < NOTHING  # and each input came with its own soft targets


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
    # another order of the samples makes a difference
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
    # as if the student drew its views with a different seed than the cache
    monkeypatch.setattr(
        "softcache.join.match.replayed",
        lambda header, augment: parse_augment(header.augment, seed=header.seed + 1, total=FEW),
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
    sample_ids = np.arange(FEW)
    mix = parse_augment("mixup", seed=5, total=FEW)
    weight = import_callable(f"{recorders}:teacher", what="teacher")().weight.detach()
    for line, view in zip(metrics(config.out), range(3), strict=True):
        partners = mix.partners(view, sample_ids)
        assert partners is not None
        assert (partners != sample_ids).mean() > 0.9
        # 1 - lambda
        partner_weights = torch.from_numpy(mix.partner_weights(view, sample_ids)).float()  # (FEW,)
        own_weights = 1 - partner_weights
        mixed = pixels * own_weights[:, None] + pixels[partners] * partner_weights[:, None]
        np.testing.assert_allclose(seen_by("teacher", recorders, 3)[view], mixed, atol=1e-6)
        logits = mixed @ weight
        np.testing.assert_allclose(
            cache.rows(view, sample_ids), soften(logits, 4.0), rtol=2**-10, atol=1e-3
        )
        own_losses, partner_losses = (
            functional.cross_entropy(logits, torch.from_numpy(y), reduction="none")
            for y in (labels, labels[partners])
        )
        hard = float((own_losses * own_weights + partner_losses * partner_weights).mean())
        assert line["hard"] == pytest.approx(hard, rel=1e-4)
        # the samples' own labels alone would give another loss
        assert abs(hard - float(own_losses.mean())) > 0.01
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
    train(replace(config, epochs=1, alpha=0.9))
    mix, sample_ids = parse_augment("mixup", seed=5, total=FEW), np.arange(FEW)
    partners, partner_weights = mix.partners(0, sample_ids), mix.partner_weights(0, sample_ids)
    assert partners is not None
    weight = import_callable(f"{recorders}:teacher", what="teacher")().weight.detach()
    log_probs = (torch.from_numpy(seen_by("teacher", recorders, 1)[0]) @ weight).log_softmax(-1)
    losses = -(1 - partner_weights) * log_probs[sample_ids, labels].numpy()
    losses -= partner_weights * log_probs[sample_ids, labels[partners]].numpy()
    has_both_labels = (labels >= 0) & (labels[partners] >= 0)
    assert 0 < has_both_labels.sum() < (labels >= 0).sum()
    expected = losses[has_both_labels].mean()
    assert metrics(config.out)[0]["hard"] == pytest.approx(expected, rel=1e-4)


def test_a_student_learns_from_mixed_samples(config: TrainConfig, dump_config: DumpConfig) -> None:
    mixed = dump(replace(dump_config, views=3, augment="shift:1,mixup", overwrite=True))
    config = replace(config, cache=mixed.path, epochs=12, learning_rate=0.01, alpha=0.9)
    train(replace(config, baseline=True))
    for folder in (config.out, config.out / "baseline"):
        totals = [line["total"] for line in metrics(folder)]
        assert totals[-1] < 0.9 * totals[0]


# the cache's own augmentation, and extra augmentation on top
def test_code_that_a_cache_names_is_not_run_by_itself(
    config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    cache = views_of(dump_config, recorders, f"{recorders}:own,flip")
    assert cache.header.augment == "recorders.py:own,flip"
    config = as_recorder(config, recorders, cache)
    with pytest.raises(
        SettingsError,
        match=r"augmented by recorders\.py:own,flip; give all of this with --augment, with the path to "
        "your file, since code named in a cache is never run automatically",
    ):
        train(config)
    for wrong in (f"{recorders}:own", f"{recorders}:other,flip", "flip"):
        with pytest.raises(
            SettingsError,
            match=rf"--augment {re.escape(wrong)} is not the cache's own \(recorders\.py:own,flip\): "
            r".*; give all of recorders\.py:own,flip, or add it on top with --extra-augment",
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


@pytest.mark.parametrize("augment", [None, "shift:2"])
@pytest.mark.parametrize("wrong", ["flip", "shift:1", "shift:2,flip", "mixup"])
def test_another_augmentation_than_the_caches_is_refused_before_a_folder_is_made(
    augment: str | None, wrong: str, config: TrainConfig, dump_config: DumpConfig
) -> None:
    dump(replace(dump_config, augment=augment, eval_data=None, overwrite=True))
    with pytest.raises(
        SettingsError,
        match=rf"--augment {wrong} is not the cache's own \({augment or 'none'}\): it would change the "
        "pixels that the cached targets belong to; leave it out, or add it on top with --extra-augment",
    ):
        train(replace(config, augment=wrong))
    assert not config.out.exists()


def test_the_caches_own_augmentation_may_be_named_again(
    config: TrainConfig, dump_config: DumpConfig, teacher_file: Path
) -> None:
    dump(replace(dump_config, views=2, augment="shift:2", overwrite=True))
    train(replace(as_teacher(config, teacher_file), augment="shift:2"))
    assert max(soft(config.out)) < NOTHING


@pytest.mark.parametrize("augment", [None, "shift:1"])
def test_extra_augmentation_comes_on_top_of_the_view_that_the_teacher_saw(
    augment: str | None, config: TrainConfig, dump_config: DumpConfig, recorders: Path
) -> None:
    cache = views_of(dump_config, recorders, augment, views=3 if augment else 1)
    config = as_recorder(config, recorders, cache, extra_augment="flip,cutout:3")
    train(config)
    views = seen_by("teacher", recorders, cache.header.views)
    extra = parse_augment("flip,cutout:3", seed=config.seed, total=FEW)
    for epoch, inputs in enumerate(seen_by("student", recorders, 4)):
        order = order_of(config, epoch)
        view = torch.from_numpy(views[epoch % len(views)][order]).view(-1, 1, 8, 8)
        # with a separate stream; otherwise it would repeat the draws of the cache's augmentation
        expected = extra(view, None, epoch, order, first_stream=EXTRA_STREAM)
        np.testing.assert_array_equal(inputs, expected.flatten(1))
    # the soft targets are still those of the view without extra augmentation
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
        match=rf"--extra-augment {re.escape(extra)}: only the built-in operations can be added on "
        r"top; use .* in softcache dump --augment instead",
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
        alpha=0.9,
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
    assert not any("hard" in line for line in lines)
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

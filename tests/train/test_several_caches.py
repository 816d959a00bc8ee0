"""Training from several caches at once: every sample once per epoch, with its own soft targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from softcache.cache import open_cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, SettingsError
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.configs import replace
from tests.conftest import make_arrays
from tests.train.loop_cases import NOTHING, metrics, same_weights, soft

SAMPLES = 60

# a teacher, and a student that is the teacher and records its inputs
MODELS = """
from pathlib import Path

import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, name="", inputs=64, classes=5, seed=7):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(inputs, classes, generator=generator))
        self.name = name

    def forward(self, x):
        if self.name:
            with Path(__file__).with_name(self.name).open("ab") as file:
                file.write(x.detach().numpy().tobytes())
        return x.flatten(1) @ self.weight

def teacher():
    return Model()

def student():
    return Model("student.f4")

def six():
    return Model(classes=6)

def wide():
    return Model(inputs=144)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The file that defines the models."""
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


MakeCache = Callable[..., Path]


@pytest.fixture
def make_cache(models: Path, tmp_path: Path) -> MakeCache:
    """Dump the teacher's soft targets for the arrays in name.npz into a file."""

    def make_cache(out: str, name: str = "whole", **changes: Any) -> Path:
        config = DumpConfig(
            teacher=f"{models}:teacher",
            data=f"npz:{tmp_path}/{name}.npz",
            temperature=4.0,
            out=tmp_path / out,
            batch_size=25,
            device="cpu",
        )
        return dump(replace(config, **changes)).path

    return make_cache


@pytest.fixture(autouse=True)
def _data(tmp_path: Path) -> None:
    """All samples; the first 20 with labels; the others without."""
    images, labels = make_arrays(SAMPLES)
    np.savez(tmp_path / "whole.npz", x=images, y=labels)
    np.savez(tmp_path / "labelled.npz", x=images[:20], y=labels[:20])
    np.savez(tmp_path / "unlabelled.npz", x=images[20:])


@pytest.fixture
def config(models: Path, tmp_path: Path) -> TrainConfig:
    """A run in which the teacher itself is the student, with too small a learning rate to change it."""
    return make_train_config(
        student=f"{models}:student",
        data=f"npz:{tmp_path}/whole.npz",
        out=tmp_path / "run",
        epochs=3,
        batch_size=16,
        learning_rate=1e-12,
        device="cpu",
    )


def seen(models: Path) -> npt.NDArray[np.float32]:
    """The inputs of the student in each epoch, (epochs, SAMPLES, 64)."""
    return np.fromfile(models.with_name("student.f4"), np.float32).reshape(-1, SAMPLES, 64)


def sorted_rows(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The samples, flattened and sorted, so that two sets of samples can be compared."""
    rows = np.asarray(values.reshape(len(values), -1), np.float32)
    return rows[np.lexsort(rows.T)]


def pixels() -> npt.NDArray[np.float32]:
    """All samples as the student sees them, sorted."""
    return sorted_rows(to_float(torch.from_numpy(make_arrays(SAMPLES)[0])).numpy())


# the samples of an epoch


def test_two_shards_with_one_data_set_give_each_sample_once_in_an_epoch(
    config: TrainConfig, make_cache: MakeCache, models: Path
) -> None:
    shards = [make_cache(f"{part}.h5", shard=(part, 2)) for part in (0, 1)]
    train(replace(config, cache=shards))
    for inputs in seen(models):
        np.testing.assert_array_equal(sorted_rows(inputs), pixels())
    assert max(soft(config.out)) < NOTHING


def test_a_shard_given_twice_would_be_noticed(
    config: TrainConfig, make_cache: MakeCache, models: Path
) -> None:
    shard = make_cache("0.h5", shard=(0, 2))
    train(replace(config, cache=[shard, shard]))
    assert not np.array_equal(sorted_rows(seen(models)[0]), pixels())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rotate", [True, False])
def test_shards_of_mixed_views_come_with_the_targets_of_their_pixels(
    rotate: bool, workers: int, config: TrainConfig, make_cache: MakeCache
) -> None:
    shards = [
        make_cache(f"{part}.h5", shard=(part, 3), views=2, augment="shift:1,mixup", seed=5)
        for part in range(3)
    ]
    train(replace(config, cache=shards, rotate=rotate, workers=workers))
    assert max(soft(config.out)) < NOTHING


def test_every_batch_is_drawn_from_all_data_alike(
    config: TrainConfig, make_cache: MakeCache, tmp_path: Path, models: Path
) -> None:
    names = ("labelled", "unlabelled")
    config = replace(
        config,
        cache=[make_cache(f"{name}.h5", name) for name in names],
        data=[f"npz:{tmp_path}/{name}.npz" for name in names],
    )
    train(config)
    labelled = {
        row.tobytes() for row in to_float(torch.from_numpy(make_arrays(SAMPLES)[0]))[:20].numpy()
    }
    for inputs in seen(models):
        np.testing.assert_array_equal(sorted_rows(inputs), pixels())
        drawn = [row.tobytes() in labelled for row in inputs]
        assert all(0 < sum(drawn[start : start + 16]) < 12 for start in (0, 16, 32))
    assert max(soft(config.out)) < NOTHING


def test_unlabelled_data_take_no_part_in_the_cross_entropy(
    config: TrainConfig, make_cache: MakeCache, tmp_path: Path, models: Path
) -> None:
    names = ("unlabelled", "labelled")
    config = replace(
        config,
        cache=[make_cache(f"{name}.h5", name) for name in names],
        data=[f"npz:{tmp_path}/{name}.npz" for name in names],
        batch_size=SAMPLES,
        alpha=0.9,
    )
    train(config)
    images, labels = make_arrays(SAMPLES)
    weight = import_callable(f"{models}:teacher", what="teacher")().weight.detach()
    logits = to_float(torch.from_numpy(images)).flatten(1) @ weight
    expected = functional.cross_entropy(logits[:20], torch.from_numpy(labels[:20]))
    for line in metrics(config.out):
        assert line["hard"] == pytest.approx(float(expected), rel=1e-4)


def test_mixed_and_plain_samples_are_learned_together(
    config: TrainConfig, make_cache: MakeCache, tmp_path: Path
) -> None:
    plain, mixed = make_cache("plain.h5"), make_cache("mixed.h5", augment="mixup", views=2)
    config = replace(config, batch_size=2 * SAMPLES, rotate=False)
    lines = []
    for cache in ([plain], [mixed], [mixed, plain]):
        train(replace(config, cache=cache, overwrite=True, alpha=0.9))
        lines.append(metrics(config.out))
    for plain_line, mixed_line, both in zip(*lines, strict=True):
        mean = (plain_line["hard"] + mixed_line["hard"]) / 2
        assert both["hard"] == pytest.approx(mean, rel=1e-4)
        assert both["soft"] < NOTHING


@pytest.mark.parametrize("rotate", [True, False])
def test_each_cache_goes_through_its_own_views(
    rotate: bool, config: TrainConfig, make_cache: MakeCache
) -> None:
    caches = [
        make_cache("0.h5", shard=(0, 2), views=3, augment="shift:2"),
        make_cache("1.h5", shard=(1, 2), views=2, first_view=7, augment="shift:2"),
    ]
    train(replace(config, cache=caches, epochs=7, rotate=rotate))
    assert len(soft(config.out)) == 7
    assert max(soft(config.out)) < NOTHING


def test_data_are_given_in_the_order_of_the_caches(
    config: TrainConfig, make_cache: MakeCache, tmp_path: Path
) -> None:
    names = ("labelled", "unlabelled")
    caches = [make_cache(f"{name}.h5", name) for name in names]
    data = [f"npz:{tmp_path}/{name}.npz" for name in reversed(names)]
    with pytest.raises(
        DataError,
        match=r"sample 0 of npz:unlabelled\.npz@train is not in .*labelled\.h5, .* \(40 of 40",
    ):
        train(replace(config, cache=caches, data=data))
    assert not config.out.exists()


def test_processes_that_load_change_nothing(
    config: TrainConfig, make_cache: MakeCache, tmp_path: Path
) -> None:
    shards = [make_cache(f"{part}.h5", shard=(part, 2)) for part in (0, 1)]
    config = replace(config, cache=shards, student="mlp:8", learning_rate=0.01)
    train(config)
    train(replace(config, workers=2, out=tmp_path / "again"))
    assert same_weights(config.out, tmp_path / "again")
    assert metrics(config.out) == metrics(tmp_path / "again")
    train(replace(config, cache=shards[:1], out=tmp_path / "other"))
    assert not same_weights(config.out, tmp_path / "other")


def test_the_folder_names_every_cache_and_its_data(
    config: TrainConfig, make_cache: MakeCache, tmp_path: Path
) -> None:
    names = ("labelled", "unlabelled")
    caches = [make_cache(f"{name}.h5", name) for name in names]
    data = [f"npz:{tmp_path}/{name}.npz" for name in names]
    train(replace(config, cache=caches, data=data))
    text = (config.out / "config.json").read_text()
    facts = json.loads(text)
    assert facts["content_ids"] == [open_cache(cache).content_id() for cache in caches]
    assert facts["settings"]["cache"] == ["labelled.h5", "unlabelled.h5"]
    assert facts["settings"]["data"] == ["npz:labelled.npz@train", "npz:unlabelled.npz@train"]
    assert str(tmp_path) not in text


# encodings

ENCODINGS = ["dense", "topk:2", "topk:3", "quantized", "sampled:3"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("dense", "topk:2"),
        ("topk:2", "topk:2"),
        ("topk:3", "topk:2"),
        ("quantized", "dense"),
        ("topk:3", "sampled:3"),
        ("sampled:3", "dense"),
        ("topk:2", "sampled:3"),
        ("sampled:2", "sampled:3"),
    ],
)
def test_caches_of_different_encodings_have_the_mean_of_their_losses(
    first: str, second: str, config: TrainConfig, make_cache: MakeCache, tmp_path: Path
) -> None:
    caches = [
        make_cache(f"{number}.h5", encoding=encoding, shard=(number, 2))
        for number, encoding in enumerate((first, second))
    ]
    # a student that differs from the teacher, so that its loss is not 0
    config = replace(config, student="mlp:8", batch_size=SAMPLES, epochs=2)
    losses = []
    for number, cache in enumerate([caches[:1], caches[1:], caches]):
        out = tmp_path / f"run{number}"
        train(replace(config, cache=cache, out=out, temperature=4.0))
        losses.append(soft(out))
    np.testing.assert_allclose(losses[2], np.mean(losses[:2], 0), rtol=1e-4)
    assert abs(losses[0][0] - losses[1][0]) > 0.001  # either one alone would fail above


# caches that do not fit together


def test_caches_of_different_classes_are_refused(
    config: TrainConfig, make_cache: MakeCache, models: Path
) -> None:
    caches = [make_cache("five.h5"), make_cache("six.h5", teacher=f"{models}:six")]
    with pytest.raises(
        SettingsError,
        match=r"six\.h5 has classes 6, .*five\.h5 has 5; expected the same in all caches: train a student "
        "from each$",
    ):
        train(replace(config, cache=caches, temperature=2.0))
    assert not config.out.exists()


def test_caches_of_different_temperatures_are_used_at_one(
    config: TrainConfig, make_cache: MakeCache
) -> None:
    caches = [make_cache("four.h5"), make_cache("two.h5", temperature=2.0)]
    sampled = make_cache("draws.h5", temperature=2.0, encoding="sampled:3")
    with pytest.raises(
        SettingsError,
        match=r"draws\.h5 has temperature 2\.0, .*four\.h5 has 4\.0; expected the same in all caches: "
        "choose one with --temperature$",
    ):
        train(replace(config, cache=[caches[0], sampled]))
    assert not config.out.exists()
    for temperature in (None, 1.0, 2.0, 4.0):
        train(replace(config, cache=caches, temperature=temperature, overwrite=True))
        assert max(soft(config.out)) < NOTHING


def test_a_sampled_cache_among_others_keeps_its_own_temperature(
    config: TrainConfig, make_cache: MakeCache
) -> None:
    caches = [make_cache("dense.h5"), make_cache("sampled.h5", encoding="sampled:3")]
    with pytest.raises(
        SettingsError, match="temperature 2 of a sampled cache made at 4: draws cannot be re-temp"
    ):
        train(replace(config, cache=caches, temperature=2.0))


def test_inputs_of_different_shapes_are_refused(
    config: TrainConfig, make_cache: MakeCache, models: Path, tmp_path: Path
) -> None:
    images, labels = make_arrays(SAMPLES)
    large = np.pad(images, [(0, 0), (0, 0), (2, 2), (2, 2)])
    np.savez(tmp_path / "large.npz", x=large, y=labels)
    caches = [make_cache("small.h5"), make_cache("large.h5", "large", teacher=f"{models}:wide")]
    data = [f"npz:{tmp_path}/{name}.npz" for name in ("whole", "large")]
    config = replace(config, cache=caches, data=data, student="cnn:4")
    with pytest.raises(
        DataError,
        match=r"inputs of npz:large\.npz@train have shape \(1, 12, 12\), inputs of npz:whole\.npz@train "
        r"have \(1, 8, 8\); expected one shape in all data sets",
    ):
        train(config)
    assert not (config.out / "student.safetensors").exists()

"""Training from a cache with an unfinished dump: it reads the complete views, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import allocate as cache_allocate
from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, ModelError
from softcache.train import loop
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.configs import replace
from tests.conftest import make_arrays
from tests.train.loop_cases import NOTHING, soft

SAMPLES = 60

# a teacher, and a student that is the teacher; both record their inputs. The environment sets the number
# of rows after which the teacher fails, not counting the sample that it is first tried on.
MODELS = """
import os
from pathlib import Path

import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, name, rows=1 << 40):
        super().__init__()
        self.file, self.rows = Path(__file__).with_name(name), int(rows)
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(64, 5, generator=generator))

    def forward(self, x):
        if len(x) > 1:
            with self.file.open("ab") as file:
                file.write(x.detach().numpy().tobytes())
            if self.file.stat().st_size > 4 * 64 * self.rows:
                raise ValueError("no more")
        return x.flatten(1) @ self.weight

def teacher():
    return Model("teacher.f4", os.environ.get("TEACHER_ROWS", 1 << 40))

def student():
    return Model("student.f4")
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The file that defines the models."""
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture
def dumped(models: Path, tmp_path: Path) -> DumpConfig:
    """Settings of a dump of 4 views."""
    images, labels = make_arrays(SAMPLES)
    np.savez(tmp_path / "few.npz", x=images, y=labels)
    return DumpConfig(
        teacher=f"{models}:teacher",
        data=f"npz:{tmp_path}/few.npz",
        temperature=4.0,
        out=tmp_path / "begun.h5",
        views=4,
        augment="shift:2",
        seed=3,
        batch_size=25,
        device="cpu",
    )


@pytest.fixture
def config(models: Path, dumped: DumpConfig, tmp_path: Path) -> TrainConfig:
    """A run from the unfinished cache in which the teacher is the student, and stays unchanged."""
    return make_train_config(
        student=f"{models}:student",
        data=dumped.data,
        cache=partial_path(dumped.out),
        out=tmp_path / "run",
        epochs=3,
        batch_size=16,
        learning_rate=1e-12,
        device="cpu",
    )


Unfinished = Callable[[int], Path]


@pytest.fixture
def unfinished(dumped: DumpConfig, monkeypatch: pytest.MonkeyPatch, models: Path) -> Unfinished:
    """Stop the dump after some rows, and return the file that it leaves."""

    def unfinished(rows: int) -> Path:
        monkeypatch.setattr(
            cache_allocate, "block_rows", lambda *layout: 7
        )  # so that blocks end within batches
        monkeypatch.setenv("TEACHER_ROWS", str(rows))
        with pytest.raises(ModelError, match="raised ValueError on samples"):
            dump(dumped)
        monkeypatch.delenv("TEACHER_ROWS")
        return partial_path(dumped.out)

    return unfinished


def seen(name: str, models: Path) -> npt.NDArray[np.float32]:
    """The inputs of a model, (epochs or complete views, SAMPLES, 64)."""
    inputs = np.fromfile(models.with_name(f"{name}.f4"), np.float32).reshape(-1, 64)
    return inputs[: len(inputs) // SAMPLES * SAMPLES].reshape(-1, SAMPLES, 64)


def sorted_rows(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The samples sorted, so that two sets of samples can be compared."""
    rows = values.reshape(-1, 64)
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("rotate", [True, False])
def test_an_unfinished_cache_trains_with_its_complete_views_alone(
    rotate: bool,
    config: TrainConfig,
    unfinished: Unfinished,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = unfinished(2 * SAMPLES + 40)  # the third view is incomplete
    blocks = open_cache(partial, unfinished=True).arrays["digests"] != 0
    assert (blocks.all(1).tolist(), blocks[2].any()) == ([True, True, False, False], True)
    config = replace(config, epochs=6, rotate=rotate)
    before = partial.read_bytes()
    train(config)
    assert partial.read_bytes() == before
    views, epochs = seen("teacher", models)[:2], seen("student", models)
    for epoch, inputs in enumerate(epochs):
        is_equal = np.abs(inputs[:, None, None] - views).max(-1) == 0  # (inputs, views, samples)
        assert is_equal.any((1, 2)).all()  # every input is from one of the two complete views
        if not rotate:
            np.testing.assert_array_equal(sorted_rows(inputs), sorted_rows(views[epoch % 2]))
    # in two epochs, each sample is seen in both views
    np.testing.assert_array_equal(sorted_rows(epochs[:2]), sorted_rows(views))
    assert max(soft(config.out)) < NOTHING
    # reading the incomplete views would give wrong targets
    monkeypatch.setattr(loop, "open_trainable", lambda path: open_cache(path, unfinished=True))
    train(replace(config, overwrite=True, verify=False))
    assert max(soft(config.out)) > 100 * NOTHING


@pytest.mark.parametrize("rows", [0, 30, SAMPLES - 1])
def test_an_unfinished_cache_without_a_complete_view_is_refused(
    rows: int, config: TrainConfig, unfinished: Unfinished
) -> None:
    unfinished(rows)
    with pytest.raises(
        FormatError,
        match=r"begun\.h5\.partial is unfinished, and training needs at least its first view complete; ",
    ):
        train(config)
    assert not config.out.exists()


def test_a_run_from_an_unfinished_cache_has_no_content_id(
    config: TrainConfig, unfinished: Unfinished, dumped: DumpConfig, tmp_path: Path
) -> None:
    partial = unfinished(SAMPLES)
    whole = dump(replace(dumped, out=tmp_path / "whole.h5"))
    train(replace(config, cache=[partial, whole.path]))
    facts = json.loads((config.out / "config.json").read_text())
    assert facts["content_ids"] == [None, whole.content_id()]
    assert facts["settings"]["cache"] == ["begun.h5.partial", "whole.h5"]


def test_a_cache_that_lacks_only_its_summary_trains_with_all_views(
    config: TrainConfig, unfinished: Unfinished, models: Path
) -> None:
    unfinished(4 * SAMPLES + 10)  # the teacher fails while the finished rows are compared
    train(replace(config, epochs=4))
    views, epochs = seen("teacher", models)[:4], seen("student", models)
    np.testing.assert_array_equal(sorted_rows(epochs), sorted_rows(views))
    assert max(soft(config.out)) < NOTHING


def test_a_dump_goes_on_after_its_unfinished_cache_has_trained(
    config: TrainConfig, unfinished: Unfinished, dumped: DumpConfig, tmp_path: Path
) -> None:
    unfinished(2 * SAMPLES)
    train(config)
    whole = dump(replace(dumped, out=tmp_path / "whole.h5"))
    assert dump(dumped).path.read_bytes() == whole.path.read_bytes()


def test_damage_in_a_complete_view_of_an_unfinished_cache_is_found(
    config: TrainConfig, unfinished: Unfinished
) -> None:
    partial = unfinished(SAMPLES + 20)
    raw = bytearray(partial.read_bytes())
    raw[open_cache(partial, unfinished=True).header.array("log_probs").offset + 101] ^= 4
    partial.write_bytes(raw)
    with pytest.raises(FormatError, match=r"is damaged: soft targets of samples 7 to 13 in view 0"):
        train(config)
    assert not config.out.exists()

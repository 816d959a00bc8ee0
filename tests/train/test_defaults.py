"""The temperature that students learn at unless another is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.train.defaults import default_temperature, entropy_share, with_defaults
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.configs import replace

SHARP = """
import torch
class Sharp(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
    def forward(self, x):
        # the same logits for every sample, in an order of its own
        ranks = (x.flatten(1)[:, :5] * 1000).argsort(1).argsort(1)
        return self.scale * torch.tensor([4.0, 1.0, 0.5, 0.2, 0.0])[ranks]
"""


def cache_of(scale: float, dump_config: DumpConfig, tmp_path: Path, **changes: Any) -> Cache:
    """A cache of a teacher whose certainty grows with `scale`."""
    code = tmp_path / f"sharp{scale}.py"
    code.write_text(f"{SHARP}\ndef teacher(): return Sharp({scale})\n")
    config = replace(
        dump_config,
        teacher=f"{code}:teacher",
        eval_data=None,
        out=tmp_path / f"{scale}.h5",
        **changes,
    )
    return dump(config)


@pytest.mark.parametrize(
    ("scale", "temperature", "short"),
    [
        (0.5, 0.5, 0.5),
        (1.2, 1.0, 1.0),
        (2.0, 2.0, 1.0),
        (3.0, 2.0, 2.0),
        (6.0, 4.0, 4.0),
        (40.0, 4.0, 4.0),
    ],
)
def test_a_teacher_that_is_nearly_certain_gets_a_higher_one(
    dump_config: DumpConfig, tmp_path: Path, scale: float, temperature: float, short: float
) -> None:
    cache = cache_of(scale, dump_config, tmp_path)
    chosen, reason = default_temperature([cache], 20)
    assert chosen == temperature
    assert default_temperature([cache], 19)[0] == short
    share = entropy_share([cache], temperature)
    assert f"{share:.1%} of the largest entropy" in reason
    assert ("and only" in reason) == (temperature > 0.5)
    logits = scale * np.array([4.0, 1.0, 0.5, 0.2, 0.0]) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    assert share == pytest.approx(-(p * np.log(p)).sum() / np.log(5), rel=1e-2, abs=1e-6)


def test_what_is_asked_for_stays_and_the_choice_is_told_and_recorded(
    dump_config: DumpConfig, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = cache_of(3.0, dump_config, tmp_path)
    config = make_train_config(
        students=[{}, {"temperature": 8.0}, {"alpha": 0.0}], student="mlp:4",
        cache=cache.path, data=f"npz:{data_file}", out=tmp_path / "run", epochs=1, device="cpu",
        baseline=True,
    )  # fmt: skip
    changed, line = with_defaults(config, [cache])
    assert [student.temperature for student in changed.students] == [2.0, 8.0, None]
    assert line.startswith("temperature 2: the soft targets have ")
    capsys.readouterr()
    students = train(config)
    assert capsys.readouterr().out.splitlines()[0] == line
    assert {student.temperature for student in students if student.alpha} == {2.0, 8.0}


def test_draws_have_only_their_own(dump_config: DumpConfig, tmp_path: Path) -> None:
    cache = cache_of(1.2, dump_config, tmp_path, encoding="sampled:8")
    assert default_temperature([cache], 20) == (4.0, "the only one of sampled soft targets")


def test_nothing_is_chosen_where_nothing_is_needed(
    dump_config: DumpConfig, data_file: Path, tmp_path: Path
) -> None:
    cache = cache_of(1.2, dump_config, tmp_path)
    asked: list[dict[str, Any]] = [{"temperature": 3.0}, {"alpha": 0.0}]
    for changes in asked:
        config = make_train_config(
            student="mlp:4",
            cache=cache.path,
            data=f"npz:{data_file}",
            out=tmp_path / "run",
            **changes,
        )
        assert with_defaults(config, [cache]) == (config, "")
    config = make_train_config(student="mlp:4", data=f"npz:{data_file}", out=tmp_path / "run")
    assert with_defaults(config, []) == (config, "")


@pytest.mark.parametrize("agreement", [0.9989, 0.999, None])
def test_a_teacher_that_knows_all_labels_gets_a_higher_one(
    dump_config: DumpConfig, tmp_path: Path, agreement: float | None
) -> None:
    cache = cache_of(3.0, dump_config, tmp_path)
    summary = {**(cache.header.summary or {}), "agreement": agreement}
    cache = replace(cache, header=replace(cache.header, summary=summary))
    shares = [entropy_share([cache], temperature) for temperature in (2.0, 4.0)]
    assert 0.02 < shares[0] < 0.1 < shares[1]
    chosen, reason = default_temperature([cache], 20)
    assert chosen == (4.0 if agreement == 0.999 else 2.0)
    assert ("from a teacher that knows all labels" in reason) == (agreement == 0.999)


def test_augmented_views_get_the_lowest_one(dump_config: DumpConfig, tmp_path: Path) -> None:
    plain = cache_of(6.0, dump_config, tmp_path)
    views = cache_of(6.0, dump_config, tmp_path, views=2, augment="shift:1", overwrite=True)
    assert default_temperature([plain], 20)[0] == 4.0
    assert default_temperature([views], 20) == (
        0.5,
        "of augmented views, even certain soft targets say more than the labels",
    )
    assert default_temperature([views, plain], 20)[0] == 4.0  # not all of the targets are of views


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {},
            "alpha 1: the labels add nothing to them; loss kl; --temperature, --alpha and --loss set",
        ),
        ({"alpha": 0.5}, "loss kl; --temperature and --loss set others"),
        ({"label_smoothing": 0.1}, "alpha 0.9: for the options of the hard loss; loss kl; --temp"),
        ({"alpha": 0.5, "loss": "js"}, "--temperature sets another"),
    ],
)
def test_all_defaults_are_told_with_the_options_that_change_them(
    dump_config: DumpConfig, data_file: Path, tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    cache = cache_of(3.0, dump_config, tmp_path)
    config = make_train_config(
        student="mlp:4", cache=cache.path, data=f"npz:{data_file}", out=tmp_path / "run", **given
    )
    assert f" at 1; {told}" in with_defaults(config, [cache])[1]
    train(replace(config, epochs=1, device="cpu"))
    facts = json.loads((tmp_path / "run" / "config.json").read_text())
    assert facts["chosen"] == with_defaults(replace(config, epochs=1), [cache])[1]

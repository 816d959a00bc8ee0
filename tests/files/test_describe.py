"""Summaries of a cache, which must not import torch."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from softcache import __version__
from softcache.cache import Cache, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError
from softcache.files.describe import cache_line, describe, facts
from tests.conftest import SAMPLES, Run

STOPPING = """
import torch
from torch import nn

class Stopping(nn.Module):
    batches = 0

    def forward(self, x):
        Stopping.batches += len(x) > 1
        if Stopping.batches > 2:
            raise RuntimeError("out of power")
        return 8 * x.flatten(1)[:, :5] - 4

def teacher():
    Stopping.batches = 0
    return Stopping()
"""


@pytest.fixture
def unfinished(dump_config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A dump that stopped after two of its three blocks."""
    monkeypatch.setattr(cache_allocate, "BLOCK_BYTES", 1000)  # 100 rows of 5 float16
    (tmp_path / "stopping.py").write_text(STOPPING)
    config = dataclasses.replace(
        dump_config, teacher=f"{tmp_path / 'stopping.py'}:teacher", eval_data=None, batch_size=100
    )
    with pytest.raises(ModelError, match="out of power"):
        dump(config)
    return open_cache(tmp_path / "tiny.h5.partial", unfinished=True)


def described(cache: Cache) -> dict[str, str]:
    """The lines of a description, by title."""
    lines = (line.partition(" ") for line in describe(cache).splitlines())
    return {name: value.strip() for name, _, value in lines}


# facts


def test_facts_of_a_finished_cache(cache: Cache) -> None:
    values = facts(cache)
    assert values["complete"] is True
    assert values["content_id"] == cache.content_id()
    assert values["coverage"] == 1
    assert values["bytes_per_sample"] == cache.path.stat().st_size / SAMPLES
    assert values["class_names"] == ["0", "1", "2", "3", "4"]


def test_facts_hold_the_whole_header_and_are_json(cache: Cache) -> None:
    values = json.loads(json.dumps(facts(cache)))
    header = json.loads(cache.header_bytes)
    assert {name: values[name] for name in header} == header


def test_facts_of_an_unfinished_cache(unfinished: Cache) -> None:
    values = facts(unfinished)
    assert unfinished.header.blocks == 3
    assert values["complete"] is False
    assert values["content_id"] is None  # not final yet
    assert values["coverage"] == pytest.approx(2 / 3)
    assert values["summary"] is None


def test_a_cache_with_all_blocks_but_no_summary_is_unfinished(cache: Cache) -> None:
    header = dataclasses.replace(cache.header, summary=None)
    values = facts(dataclasses.replace(cache, header=header))
    assert (values["complete"], values["content_id"]) == (False, None)


# descriptions


def test_a_finished_cache_described(cache: Cache) -> None:
    lines = described(cache)
    summary, evaluation = cache.header.summary, cache.header.evaluation
    assert summary is not None
    assert evaluation is not None
    size = cache.path.stat().st_size
    assert lines["cache"] == f"{cache.path}, format 1.0"
    assert lines["content"] == cache.content_id()
    assert lines["samples"].startswith("300 of npz:tiny.npz@train, 1 view(s), augmented by nothing")
    assert lines["classes"] == "5: 0, 1, 2, 3, 4"
    assert lines["temperature"] == "4"
    assert lines["encoding"].startswith("dense, 10 bytes per row")
    assert lines["size"] == f"{size:,} bytes, {size / 300:,.1f} per sample"
    assert lines["teacher"].startswith("models.py:teacher, 325 parameters, in fp32")
    accuracy, errors = 1 - evaluation["errors"] / 100, evaluation["errors"]
    assert lines["accuracy"] == f"{accuracy:.2%}, {errors} errors of 100 on npz:tiny.npz@test"
    assert lines["entropy"].startswith(f"{summary['entropy']:.3f} nats")
    assert lines["agreement"] == f"{summary['agreement']:.2%} have the label as top class"
    assert f"softcache {__version__}" in lines["software"]


def test_an_unfinished_cache_described(unfinished: Cache) -> None:
    lines = described(unfinished)
    assert lines["cache"].startswith(str(unfinished.path))
    assert lines["content"] == "unfinished, 66.7% of the blocks"
    assert not {"entropy", "agreement", "accuracy"} & set(lines)


def test_views_and_augmentation_described(dump_config: DumpConfig) -> None:
    cache = dump(dataclasses.replace(dump_config, views=3, augment="shift:2", seed=9))
    expected = "300 of npz:tiny.npz@train, 3 view(s), augmented by shift:2, seed 9"
    assert described(cache)["samples"] == expected


def test_unlabelled_data_described(cache: Cache) -> None:
    assert cache.header.summary is not None
    summary = cache.header.summary | {"agreement": None}
    header = dataclasses.replace(cache.header, summary=summary)
    assert described(dataclasses.replace(cache, header=header))["agreement"] == "no labels"


def test_many_classes_are_cut_short(cache: Cache) -> None:
    names = [f"class{n}".encode() for n in range(12)]
    arrays = {**cache.arrays, "class_names": np.array(names)}
    header = dataclasses.replace(cache.header, classes=12)
    twelve_classes = dataclasses.replace(cache, header=header, arrays=arrays)
    assert described(twelve_classes)["classes"].endswith("class8, class9, …")


def test_every_teacher_is_described(cache: Cache) -> None:
    shares = {"mlp:1": 0.25, "mlp:2": 0.75}
    teachers = tuple(
        {"name": name, "parameters": 10, "weight": share} for name, share in shares.items()
    )
    text = describe(
        dataclasses.replace(cache, header=dataclasses.replace(cache.header, teachers=teachers))
    )
    assert re.search(r"teacher 1 +mlp:1, 10 parameters, weight 0\.25, in fp32", text)
    assert re.search(r"teacher 2 +mlp:2, 10 parameters, weight 0\.75, in fp32", text)


# the command


def test_the_command_prints_the_description_or_json(cache: Cache, run: Run) -> None:
    assert run("info", "tiny.h5", check=True).stdout == (
        describe(dataclasses.replace(cache, path=Path("tiny.h5"))) + "\n"
    )
    assert json.loads(run("info", "tiny.h5", "--json", check=True).stdout) == json.loads(
        json.dumps(facts(cache))
    )


def test_the_command_describes_an_unfinished_cache(unfinished: Cache, run: Run) -> None:
    result = run("info", unfinished.path, check=True)
    assert "unfinished, 66.7% of the blocks" in result.stdout


def imported(*arguments: str | Path) -> set[str]:
    """The top-level packages that a Python process with these arguments imports."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


# packages that take seconds to import; h5py also because libhdf5 must not read untrusted files
HEAVY = {"torch", "accelerate", "safetensors", "h5py"}


def test_info_imports_neither_torch_nor_libhdf5(cache: Cache) -> None:
    packages = imported("-m", "softcache", "info", cache.path)
    assert {"softcache", "numpy", "json"} <= packages  # so that the list is not empty
    assert not packages & HEAVY


def test_an_import_of_torch_or_libhdf5_would_be_noticed() -> None:
    packages = imported(
        "-c", "from softcache.cache import writer; import softcache.train.student, h5py"
    )
    assert packages >= HEAVY


def test_importing_softcache_is_light_too() -> None:
    assert not imported("-c", "import softcache") & {*HEAVY, "numpy", "click"}


def test_a_finished_dump_in_one_line(cache: Cache) -> None:
    assert cache.header.summary is not None
    entropy, agreement = cache.header.summary["entropy"], cache.header.summary["agreement"]
    assert cache_line(cache) == (
        f"{cache.path}: 300 samples x 1 view(s), 5 classes, dense, "
        f"{cache.path.stat().st_size:,} bytes; entropy {entropy:.3f} nats, top class is the label in "
        f"{agreement:.2%}; content id {cache.content_id()}"
    )
    assert "\n" not in cache_line(cache)

"""Teachers that are not torch modules: each stores the same rows as its equivalent in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError, SettingsError
from softcache.files.recheck import recheck_rows
from softcache.teachers.outputs import as_logits
from softcache.util.callables import import_callable
from tests.conftest import Run, make_arrays

FUNCTIONS = """
import numpy as np

W = np.random.default_rng(0).normal(0, 1, (64, 5)).astype(np.float32)

def _logits(x):
    assert x.dtype == np.float32
    return x.reshape(len(x), -1) @ W

def logits():
    return _logits

def probabilities():
    def f(x):
        z = np.exp(_logits(x).astype(np.float64))
        return z / z.sum(-1, keepdims=True)
    return f

def log_probabilities():
    return lambda x: np.log(probabilities()(x))

def hard():
    return lambda x: np.eye(5)[_logits(x).argmax(-1)]

def halves():
    return lambda x: 0.5 * probabilities()(x)

def fails():
    def f(x):
        raise ValueError("no more")
    return f

def nothing():
    return 3
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def rows(cache: Cache, temperature: float | None = None) -> npt.NDArray[np.float32]:
    return cache.rows(0, np.arange(300), temperature)


def config(dump_config: DumpConfig, teacher: Path | str, **changes: Any) -> DumpConfig:
    return replace(dump_config, teacher=str(teacher), **changes)


# functions


@pytest.mark.parametrize("output", ["logits", "probabilities", "log_probabilities"])
def test_a_function_of_numpy_is_a_teacher(
    output: str, functions: Path, dump_config: DumpConfig
) -> None:
    cache = dump(config(dump_config, f"{functions}:{output}", teacher_output=output))
    images = make_arrays()[0].reshape(300, -1).astype(np.float32) / 255
    weights = np.random.default_rng(0).normal(0, 1, (64, 5)).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(images @ weights) / 4.0, -1)
    np.testing.assert_allclose(rows(cache), expected, atol=4e-3)
    assert cache.header.teachers[0].get("output", "logits") == output
    assert cache.header.evaluation is not None


def test_views_and_verification_work_as_with_any_teacher(
    functions: Path, dump_config: DumpConfig
) -> None:
    settings = config(
        dump_config, f"{functions}:probabilities", teacher_output="probabilities", views=2, augment="shift:1"
    )  # fmt: skip
    cache = dump(settings)
    report = recheck_rows(
        cache.path,
        teacher=[f"{functions}:probabilities"],
        weights=[],
        data=settings.data,
        rows=50,
        device="cpu",
    )
    assert "KL(teacher ‖ stored)" in report


def test_a_probability_of_zero_is_finite(functions: Path, dump_config: DumpConfig) -> None:
    cache = dump(config(dump_config, f"{functions}:hard", teacher_output="probabilities"))
    assert np.isfinite(rows(cache)).all()
    assert rows(cache, 1.0).max() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        (
            "logits",
            "probabilities",
            "returns a row that does not hold probabilities: its probabilities sum to .*; say what the",
        ),
        (
            "probabilities",
            "log_probabilities",
            "returns a row that does not hold log-probabilities: its probabilities sum to",
        ),
        ("halves", "probabilities", r"its probabilities sum to 0\.5,"),
        (
            "probabilities",
            "logits",
            r"sum to 1: probabilities, not logits, .*; add --teacher-output",
        ),
        ("fails", "logits", r"raised ValueError on samples 0 to 0, .*: no more"),
    ],
)
def test_what_is_not_what_it_says_is_told(
    name: str, output: str, message: str, functions: Path, dump_config: DumpConfig
) -> None:
    with pytest.raises(ModelError, match=message):
        dump(config(dump_config, f"{functions}:{name}", teacher_output=output))
    assert not list(dump_config.out.parent.glob("*.h5*"))


def test_neither_module_nor_function_is_told(functions: Path, dump_config: DumpConfig) -> None:
    with pytest.raises(
        ModelError, match=r"returned int; expected a torch nn\.Module, or a function"
    ):
        dump(config(dump_config, f"{functions}:nothing"))


def test_a_sum_within_rounding_is_a_probability() -> None:
    probabilities = torch.tensor([[0.5, 0.505], [0.0, 1.0]])
    logits = as_logits(probabilities, "probabilities", "x")
    assert logits.isfinite().all()
    with pytest.raises(ModelError, match=r"its probabilities sum to 1\.03"):
        as_logits(torch.tensor([[0.5, 0.53]]), "probabilities", "x")
    with pytest.raises(ModelError, match=r"its smallest value is -0\.1"):
        as_logits(torch.tensor([[-0.1, 1.1]]), "probabilities", "x")


# ONNX


def test_an_onnx_file_is_the_module_it_was_made_of(
    teacher_file: Path, dump_config: DumpConfig, tmp_path: Path, run: Run
) -> None:
    pytest.importorskip("onnxscript")
    module: nn.Module = import_callable(f"{teacher_file}:teacher", what="teacher")().eval()
    path = tmp_path / "teacher.onnx"
    torch.onnx.export(
        module, (torch.rand(2, 1, 8, 8),), path, dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    run("dump", "--teacher", path, "--data", dump_config.data, "--out", "onnx.h5", check=True)
    from softcache.cache import open_cache

    cache, expected = open_cache(tmp_path / "onnx.h5"), dump(replace(dump_config, eval_data=None))
    np.testing.assert_allclose(rows(cache), rows(expected), atol=4e-3)
    provenance = cache.header.teachers[0]
    assert provenance["name"] == "teacher.onnx"
    assert provenance["parameters"] == expected.header.teachers[0]["parameters"]


def test_a_broken_onnx_file_is_told(dump_config: DumpConfig, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(
        ModelError, match=r"broken\.onnx is not an ONNX model that onnxruntime can open"
    ):
        dump(config(dump_config, tmp_path / "broken.onnx"))


def test_without_the_extra_it_is_named(
    dump_config: DumpConfig, tmp_path: Path, without: Callable[[str], None]
) -> None:
    (tmp_path / "t.onnx").write_bytes(b"")
    without("onnxruntime")
    with pytest.raises(SettingsError, match=r"an ONNX teacher needs .*'softcache\[onnx\]'"):
        dump(config(dump_config, tmp_path / "t.onnx"))


# matrices


def save_matrix(path: Path, values: npt.NDArray[Any]) -> None:
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, logits=values, note=np.zeros(3))
    else:
        torch.save(torch.from_numpy(values), path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8"])
def test_a_matrix_becomes_a_cache(
    suffix: str, dtype: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (300, 5)).astype(dtype)
    save_matrix(tmp_path / f"outputs{suffix}", logits)
    cache = dump(config(dump_config, tmp_path / f"outputs{suffix}", eval_data=None))
    expected = torch.log_softmax(torch.from_numpy(logits.astype("f4")) / 4.0, -1)
    np.testing.assert_allclose(rows(cache), expected, atol=4e-3)
    assert cache.header.teachers[0]["name"] == f"outputs{suffix}"


def test_every_shard_takes_its_own_rows(dump_config: DumpConfig, tmp_path: Path) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (300, 5)).astype("f4")
    np.save(tmp_path / "outputs.npy", logits)
    cache = dump(config(dump_config, tmp_path / "outputs.npy", eval_data=None, shard=(1, 3)))
    expected = torch.log_softmax(torch.from_numpy(logits[100:200]) / 4.0, -1)
    np.testing.assert_allclose(cache.rows(0, np.arange(100)), expected, atol=4e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.zeros((299, 5), "f4"),
            "has 299 rows, npz:.* has 300 samples; expected a row for",
        ),
        (np.zeros(300, "f4"), r"holds float32 \(300,\); expected numbers \(samples, classes\)"),
        (np.zeros((300, 5), "U1"), r"holds <U1 \(300, 5\); expected numbers"),
        (
            np.full((300, 5), np.nan, "f4"),
            "returns nan for sample 0, class 0; expected finite logits",
        ),
    ],
)
def test_a_matrix_that_does_not_fit_is_told(
    values: npt.NDArray[Any], message: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    np.save(tmp_path / "outputs.npy", values)
    with pytest.raises(ModelError, match=message):
        dump(config(dump_config, tmp_path / "outputs.npy", eval_data=None))


def test_pickles_are_not_opened(dump_config: DumpConfig, tmp_path: Path) -> None:
    np.save(tmp_path / "outputs.npy", np.array([[{}, {}]], dtype=object), allow_pickle=True)
    with pytest.raises(ModelError, match=r"outputs\.npy cannot be read: ValueError"):
        dump(config(dump_config, tmp_path / "outputs.npy", eval_data=None))


def test_a_pickle_of_torch_is_not_opened(dump_config: DumpConfig, tmp_path: Path) -> None:
    torch.save(Path("outputs"), tmp_path / "outputs.pt")
    with pytest.raises(
        ModelError, match=r"outputs\.pt holds more than tensors, which softcache never loads"
    ):
        dump(config(dump_config, tmp_path / "outputs.pt", eval_data=None))


@pytest.mark.parametrize("changes", [{"views": 2, "augment": "shift:1"}, {"eval_data": "npz:x"}])
def test_a_matrix_knows_nothing_of_other_inputs(
    changes: dict[str, Any], dump_config: DumpConfig
) -> None:
    with pytest.raises(
        SettingsError, match=r"outputs\.npy is a matrix with one row of outputs for each of these"
    ):
        config(dump_config, "outputs.npy", **({"eval_data": None} | changes))

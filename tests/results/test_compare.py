"""`softcache compare`: metrics of students against values that are known."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError, SettingsError
from softcache.models.build import build
from softcache.results.compare import StudentMetrics, compare, measure_all, open_joined
from softcache.results.metrics import (
    best_temperature,
    calibration,
    count_macs,
    gradient_similarity,
    latencies,
)
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.run_folder import expand, open_run
from tests.configs import replace
from tests.conftest import Run


@pytest.fixture
def folders(cache: Cache, data_file: Path, tmp_path: Path) -> list[Path]:
    """Two runs of the tiny cache."""
    config = make_train_config(
        student="mlp:8", students=[{"student": "mlp:8"}, {"student": "cnn:4"}], cache=cache.path,
        data=f"npz:{data_file}", eval_data=f"npz:{data_file}@test", out=tmp_path / "runs", epochs=2,
        device="cpu",
    )  # fmt: skip
    train(config)
    return [tmp_path / "runs" / name for name in ("mlp-8", "cnn-4")]


# metrics


def test_macs_are_those_of_the_layers() -> None:
    assert (
        count_macs(build("mlp:8", input_shape=(1, 8, 8), classes=5), torch.zeros(1, 1, 8, 8))
        == 64 * 8 + 40
    )
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert count_macs(convolution, torch.zeros(1, 3, 6, 6)) == 36 * 4 * 3 * 9 + 4 * 36 * 2


def test_the_ece_by_hand() -> None:
    # 2 of the 4 samples at 0.8 are right: |0.5 - 0.8|; both samples at 0.6 are: |1 - 0.6|
    rows = torch.tensor([[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 2).log()
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    result = calibration(rows, labels, bins=10)
    assert result.samples.sum() == 6
    assert result.error == pytest.approx((4 * 0.3 + 2 * 0.4) / 6, abs=1e-6)


def test_a_model_that_says_what_is_so_is_calibrated() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50_000, 6, generator=generator)
    rows = torch.log_softmax(logits, -1)
    labels = torch.multinomial(rows.exp(), 1, generator=generator)[:, 0]
    assert calibration(rows, labels).error < 0.01
    assert calibration(torch.log_softmax(3 * logits, -1), labels).error > 0.1
    assert best_temperature(logits, labels) == pytest.approx(1.0, rel=0.06)
    assert best_temperature(3 * logits, labels) == pytest.approx(3.0, rel=0.06)


def test_latency_is_of_the_model_and_the_batch() -> None:
    models = {"small": nn.Linear(8, 8), "large": nn.Sequential(*[nn.Linear(512, 512)] * 40)}
    inputs = {"small": torch.rand(64, 8), "large": torch.rand(64, 512)}
    seconds = latencies(models, inputs)
    assert seconds["large"] > 5 * seconds["small"] > 0


def test_gradients_are_more_alike_under_soft_targets(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    from softcache.results.compare import open_joined

    part = open_joined(dump(replace(dump_config, embed_inputs=True)).path, None)
    torch.manual_seed(0)
    model = build("mlp:16", input_shape=(1, 8, 8), classes=5).eval()
    similarity = gradient_similarity(model, part, 4.0, batches=4)
    assert set(similarity) == {"soft", "hard"}
    assert all(-1 <= value <= 1 for value in similarity.values())
    assert similarity["soft"] > similarity["hard"]


# the table


def test_the_table_says_what_was_measured(
    folders: list[Path], cache: Cache, data_file: Path, run: Run
) -> None:
    table = run(
        "compare", *folders, "--eval-data", f"npz:{data_file}@test", "--cache", cache.path, "--data",
        f"npz:{data_file}", check=True,
    ).stdout  # fmt: skip
    lines = table.splitlines()
    assert len(lines) == 5 + 2 + 2 + 5  # a line below, then a table of the errors by class
    assert re.split(r"\s{2,}", lines[6])[0] == "error by class"
    assert lines[8].startswith("balanced error")
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "student", "parameters", "MACs", "bytes", "ms, batch 1", "ms, batch 64", "test error",
        "KL to teacher", "ECE",
    ]  # fmt: skip
    for folder, line in zip(folders, lines[2:4], strict=True):
        facts = open_run(folder).facts
        assert f"{facts['parameters']:,}" in line
        assert f"{facts['errors'] / facts['samples']:.2%}" in line
        assert "-  " not in line  # KL and ECE were measured too
    assert lines[4].startswith("* Pareto-optimal in error, parameters and latency")


def test_kl_is_that_of_the_last_weights(folders: list[Path], cache: Cache, data_file: Path) -> None:
    joined = open_joined(cache.path, f"npz:{data_file}")
    (metrics,) = measure_all({"mlp": open_run(folders[0])}, None, joined)
    model = open_run(folders[0]).model()
    images = np.load(data_file)["x_train"]
    with torch.no_grad():
        log_q = torch.log_softmax(model(torch.from_numpy(images) / 255) / 4.0, -1).double().numpy()
    log_p = cache.rows(0, np.arange(300)).astype(np.float64)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    assert metrics.kl == pytest.approx(expected, rel=1e-4)
    assert metrics.ece is None
    assert metrics.error == open_run(folders[0]).facts["errors"] / 100


@pytest.mark.parametrize(
    ("other", "beats"),
    [
        ((0.2, 10, 2.0), False),
        ((0.3, 11, 2.0), True),
        ((0.3, 9, 3.0), False),
        ((0.2, 10, 1.0), False),
    ],
)
def test_the_front_is_of_those_that_no_other_beats(
    other: tuple[float, int, float], beats: bool
) -> None:
    def metrics(error: float, parameters: int, seconds: float) -> StudentMetrics:
        return StudentMetrics("x", parameters, 1, 1, {1: seconds, 64: 1.0}, error, None, math.nan)

    assert metrics(0.2, 10, 2.0).beats(metrics(*other)) == beats


# what cannot be compared


def test_a_folder_of_runs_stands_for_them(folders: list[Path], tmp_path: Path) -> None:
    assert expand([tmp_path / "runs", folders[0]]) == [*sorted(folders), folders[0]]
    assert "runs/cnn-4" in compare([tmp_path / "runs"])


def test_folders_that_are_no_runs_are_told(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"is not a finished run: it has no student\.safetensors; nam"
    ):
        compare([tmp_path])
    (folders[0] / "config.json").write_text("{}")
    with pytest.raises(
        SettingsError, match=r"mlp-8 is not a run .*: config\.json lacks 'settings'; get it again"
    ):
        compare(folders)
    (folders[1] / "student.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"student\.safetensors cannot be read"):
        compare([folders[1]])


def test_code_of_the_users_own_is_named(cache: Cache, data_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
    )
    config = make_train_config(
        student=f"{path}:net", cache=cache.path, data=f"npz:{data_file}", out=tmp_path / "own",
        epochs=1, device="cpu",
    )  # fmt: skip
    train(config)
    with pytest.raises(
        SettingsError, match=r"its student mine\.py:net is code, .* --student path/to/mine\.py:net"
    ):
        compare([config.out])
    assert "own" in compare([config.out], student=[f"{path}:net"])

"""`softcache import`: caches of matrices and of the top classes of each row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner

from softcache.cache import Cache, TopK, open_cache
from softcache.cli.app import main
from softcache.dump.config import DumpConfig
from softcache.errors import ModelError, SettingsError
from softcache.files.export_labels import export_labels
from softcache.files.import_labels import import_labels
from tests.conftest import make_arrays

CLASSES, SAMPLES, K = 5, 300, 3


@pytest.fixture
def probabilities() -> npt.NDArray[np.float32]:
    """(SAMPLES, CLASSES) at T = 1."""
    logits = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1)) * 3
    logits[torch.arange(SAMPLES), torch.from_numpy(make_arrays()[1])] += 6
    return np.asarray(torch.softmax(logits, -1).numpy(), np.float32)


@pytest.fixture
def data(data_file: Path) -> str:
    return f"npz:{data_file}"


def top_rows(folder: Path, probabilities: npt.NDArray[np.float32], **columns: Any) -> Path:
    """A dataset, saved to disk, with the K largest log-probabilities of each row."""
    ids = np.argsort(-probabilities, axis=1)[:, :K]
    log_probs = np.log(np.take_along_axis(probabilities, ids, 1))
    top: dict[str, Any] = {"ids": ids.tolist(), "log_probs": log_probs.tolist()}
    datasets.Dataset.from_dict(top | columns).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("output", ["logits", "probabilities", "log_probabilities"])
def test_a_matrix_of_each_kind_becomes_a_cache(
    data: str,
    tmp_path: Path,
    probabilities: npt.NDArray[np.float32],
    suffix: str,
    output: str,
) -> None:
    values = {
        "probabilities": probabilities,
        "log_probabilities": np.log(probabilities),
        "logits": np.log(probabilities) + 7,
    }[output]
    file = tmp_path / f"outputs{suffix}"
    if suffix == ".npy":
        np.save(file, values)
    elif suffix == ".npz":
        np.savez(file, outputs=values)
    else:
        torch.save(torch.from_numpy(values), file)
    cache = import_labels(str(file), data=data, out=tmp_path / "c.h5", teacher_output=output)
    stored = np.exp(cache.rows(0, np.arange(SAMPLES)))
    np.testing.assert_allclose(stored, probabilities, atol=2e-3)
    assert cache.header.temperature == 1.0


def test_soft_targets_of_another_temperature_are_undone(
    data: str, tmp_path: Path, probabilities: npt.NDArray[np.float32]
) -> None:
    at_4 = torch.softmax(torch.from_numpy(np.log(probabilities)) / 4, -1).numpy()
    np.save(tmp_path / "outputs.npy", at_4)
    arguments: dict[str, Any] = {
        "data": data,
        "teacher_output": "probabilities",
        "teacher_temperature": 4.0,
    }
    cache = import_labels(str(tmp_path / "outputs.npy"), out=tmp_path / "a.h5", **arguments)
    assert cache.header.temperature == 4.0
    assert cache.header.teachers[0]["temperature"] == 4.0
    rows = np.arange(SAMPLES)
    np.testing.assert_allclose(np.exp(cache.rows(0, rows)), at_4, atol=1e-3)
    np.testing.assert_allclose(np.exp(cache.rows(0, rows, 1.0)), probabilities, atol=4e-3)
    cache_at_1 = import_labels(
        str(tmp_path / "outputs.npy"), out=tmp_path / "b.h5", temperature=1.0, **arguments
    )
    np.testing.assert_allclose(np.exp(cache_at_1.rows(0, rows)), probabilities, atol=2e-3)


def test_top_classes_of_a_hugging_face_data_set_are_kept_exactly(
    data: str, tmp_path: Path, probabilities: npt.NDArray[np.float32]
) -> None:
    folder = top_rows(tmp_path / "rows", probabilities)
    source = f"hfds:{folder}?ids=ids&log_probs=log_probs"
    cache = import_labels(source, data=data, out=tmp_path / "c.h5", classes=CLASSES)
    assert isinstance(cache.header.encoding, TopK)
    assert cache.header.encoding.k == K
    assert cache.header.teachers[0]["name"] == "hfds:rows?ids=ids&log_probs=log_probs"
    stored = np.exp(cache.rows(0, np.arange(SAMPLES)))
    ids = np.argsort(-probabilities, axis=1)[:, :K]
    top = np.take_along_axis(probabilities, ids, 1)
    np.testing.assert_allclose(np.take_along_axis(stored, ids, 1), top, atol=2e-3)
    rest = np.take_along_axis(stored, np.argsort(-probabilities, axis=1)[:, K:], 1)
    np.testing.assert_allclose(
        rest, ((1 - top.sum(1)) / (CLASSES - K))[:, None].repeat(2, 1), atol=2e-3
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"ids": [[[0, 1, 2]] * 4] * SAMPLES},
            r"expected k numbers in every row; lists for each token need data of tokens",
        ),
        ({"ids": [[0]] + [[0, 1, 2]] * (SAMPLES - 1)}, r"expected k numbers in every row"),
        ({"ids": [[0, 1, 9]] * SAMPLES}, r"has class ids 0 to 9; expected 0 to 4"),
        (
            {"ids": [[0, 1, 1]] * SAMPLES},
            r"repeats a class id in row 0; expected distinct class ids",
        ),
        ({"ids": [[0, 1]] * SAMPLES}, r"expected equal shapes with at most 5 columns"),
        (
            {"log_probs": [[0.0, 0.0, 0.0]] * SAMPLES},
            r"the probabilities of sample 0 sum to 3; expected at most",
        ),
    ],
)
def test_rows_that_are_not_top_classes_are_refused(
    data: str,
    tmp_path: Path,
    probabilities: npt.NDArray[np.float32],
    columns: dict[str, Any],
    message: str,
) -> None:
    folder = top_rows(tmp_path / "rows", probabilities, **columns)
    source = f"hfds:{folder}?ids=ids&log_probs=log_probs"
    with pytest.raises(ModelError, match=message):
        import_labels(source, data=data, out=tmp_path / "c.h5", classes=CLASSES)
    assert not list(tmp_path.glob("c.h5*"))


def test_missing_options_are_named(
    data: str, tmp_path: Path, probabilities: npt.NDArray[np.float32]
) -> None:
    folder = top_rows(tmp_path / "rows", probabilities)
    source, out = f"hfds:{folder}?ids=ids&log_probs=log_probs", tmp_path / "c.h5"
    with pytest.raises(
        SettingsError,
        match=r"top classes of each row; state the number of all classes with --classes",
    ):
        import_labels(source, data=data, out=out)
    with pytest.raises(SettingsError, match=r"expected hfds:ID_OR_FOLDER\?ids=COLUMN&log_probs=C"):
        import_labels(f"hfds:{folder}?ids=ids", data=data, out=out, classes=CLASSES)
    with pytest.raises(SettingsError, match=r"has no column 'top'; it has ids, log_probs"):
        import_labels(source.replace("ids=ids", "ids=top"), data=data, out=out, classes=CLASSES)
    with pytest.raises(
        SettingsError, match=r"cnn:8: expected FILE\.npy, FILE\.npz, .*; a model is"
    ):
        import_labels("cnn:8", data=data, out=out)


@pytest.mark.parametrize("rows", [SAMPLES - 1, SAMPLES + 1])
def test_a_matrix_of_another_number_of_rows_is_refused(
    data: str, tmp_path: Path, rows: int
) -> None:
    np.save(tmp_path / "outputs.npy", np.zeros((rows, CLASSES), np.float32))
    with pytest.raises(
        ModelError, match=rf"has {rows} rows, npz:.* has 300 samples; expected a row"
    ):
        import_labels(str(tmp_path / "outputs.npy"), data=data, out=tmp_path / "c.h5")


def test_an_impossible_temperature_is_refused(data: str, tmp_path: Path) -> None:
    np.save(tmp_path / "outputs.npy", np.zeros((SAMPLES, CLASSES), np.float32))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(
            SettingsError, match=r"teacher-temperature is .*; expected a number above"
        ):
            DumpConfig(
                teacher="x.npy",
                data=data,
                temperature=1.0,
                teacher_temperature=temperature,
                out=tmp_path / "c.h5",
            )


def test_the_commands_are_each_others_way_back(cache: Cache, data: str, tmp_path: Path) -> None:
    exported = tmp_path / "outputs.npy"
    runner = CliRunner()
    result = runner.invoke(main, ["export-labels", str(cache.path), "-o", str(exported)])
    assert result.exit_code == 0, result.output
    result = runner.invoke(
        main,
        ["import", str(exported), "--data", data, "--out", str(tmp_path / "b.h5"), "--no-strict",
         "--holds", "probabilities", "--softened", "4"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "300 samples x 1 view(s), 5 classes, dense" in result.output
    imported, rows = open_cache(tmp_path / "b.h5"), np.arange(SAMPLES)
    np.testing.assert_allclose(imported.rows(0, rows), cache.rows(0, rows), atol=2e-3)
    np.testing.assert_array_equal(imported.keys, cache.keys)


def test_parquet_holds_sample_label_key_and_probabilities(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "targets.parquet"
    message = export_labels(cache.path, out, temperature=2.0)
    assert message.endswith(
        "probabilities of 300 samples, 5 classes, at temperature 2; the samples are not augmented"
    )
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["sample", "label", "key", "probabilities"]
    rows = np.arange(SAMPLES)
    probabilities = np.stack(table.column("probabilities").to_numpy())
    np.testing.assert_allclose(probabilities, np.exp(cache.rows(0, rows, 2.0)), rtol=1e-6)
    np.testing.assert_array_equal(table.column("sample").to_numpy(), rows)
    np.testing.assert_array_equal(table.column("label").to_numpy(), cache.labels)
    np.testing.assert_array_equal(table.column("key").to_numpy(), cache.keys)
    assert table.schema.metadata[b"softcache_content_id"].decode() == cache.content_id()
    logs = tmp_path / "logs.parquet"
    export_labels(cache.path, logs, log_probabilities=True)
    assert pyarrow.parquet.read_table(logs).column_names[-1] == "log_probabilities"

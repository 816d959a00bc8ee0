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

CLASSES, SAMPLES, K = 5, 300, 3


@pytest.fixture
def probabilities() -> npt.NDArray[np.float32]:
    """(SAMPLES, CLASSES) at T = 1."""
    logits = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1)) * 3
    return np.asarray(torch.softmax(logits, -1).numpy(), np.float32)


@pytest.fixture
def data(data_file: Path) -> str:
    return f"npz:{data_file}"


def top_rows(folder: Path, probabilities: npt.NDArray[np.float32], **columns: Any) -> Path:
    """A folder of save_to_disk with the K largest of each row."""
    ids = np.argsort(-probabilities, axis=1)[:, :K]
    log_probs = np.log(np.take_along_axis(probabilities, ids, 1))
    known: dict[str, Any] = {"ids": ids.tolist(), "log_probs": log_probs.tolist()}
    datasets.Dataset.from_dict(known | columns).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("holds", ["logits", "probabilities", "log_probabilities"])
def test_a_matrix_of_each_kind_becomes_a_cache(
    data: str,
    tmp_path: Path,
    probabilities: npt.NDArray[np.float32],
    suffix: str,
    holds: str,
) -> None:
    values = {
        "probabilities": probabilities,
        "log_probabilities": np.log(probabilities),
        "logits": np.log(probabilities) + 7,
    }[holds]
    file = tmp_path / f"said{suffix}"
    if suffix == ".npy":
        np.save(file, values)
    elif suffix == ".npz":
        np.savez(file, said=values)
    else:
        torch.save(torch.from_numpy(values), file)
    cache = import_labels(str(file), data=data, out=tmp_path / "c.h5", teacher_output=holds)
    found = np.exp(cache.rows(0, np.arange(SAMPLES)))
    np.testing.assert_allclose(found, probabilities, atol=2e-3)
    assert cache.header.temperature == 1.0


def test_soft_targets_of_another_temperature_are_undone(
    data: str, tmp_path: Path, probabilities: npt.NDArray[np.float32]
) -> None:
    at_4 = torch.softmax(torch.from_numpy(np.log(probabilities)) / 4, -1).numpy()
    np.save(tmp_path / "said.npy", at_4)
    arguments: dict[str, Any] = {
        "data": data,
        "teacher_output": "probabilities",
        "teacher_temperature": 4.0,
    }
    own = import_labels(str(tmp_path / "said.npy"), out=tmp_path / "a.h5", **arguments)
    assert own.header.temperature == 4.0
    assert own.header.teachers[0]["temperature"] == 4.0
    at = np.arange(SAMPLES)
    np.testing.assert_allclose(np.exp(own.rows(0, at)), at_4, atol=1e-3)
    np.testing.assert_allclose(np.exp(own.rows(0, at, 1.0)), probabilities, atol=4e-3)
    cold = import_labels(
        str(tmp_path / "said.npy"), out=tmp_path / "b.h5", temperature=1.0, **arguments
    )
    np.testing.assert_allclose(np.exp(cold.rows(0, at)), probabilities, atol=2e-3)


def test_top_classes_of_a_hugging_face_data_set_are_kept_exactly(
    data: str, tmp_path: Path, probabilities: npt.NDArray[np.float32]
) -> None:
    folder = top_rows(tmp_path / "rows", probabilities)
    source = f"hfds:{folder}?ids=ids&log_probs=log_probs"
    cache = import_labels(source, data=data, out=tmp_path / "c.h5", classes=CLASSES)
    assert isinstance(cache.header.encoding, TopK)
    assert cache.header.encoding.k == K
    assert cache.header.teachers[0]["name"] == "hfds:rows?ids=ids&log_probs=log_probs"
    found = np.exp(cache.rows(0, np.arange(SAMPLES)))
    ids = np.argsort(-probabilities, axis=1)[:, :K]
    top = np.take_along_axis(probabilities, ids, 1)
    np.testing.assert_allclose(np.take_along_axis(found, ids, 1), top, atol=2e-3)
    rest = np.take_along_axis(found, np.argsort(-probabilities, axis=1)[:, K:], 1)
    np.testing.assert_allclose(
        rest, ((1 - top.sum(1)) / (CLASSES - K))[:, None].repeat(2, 1), atol=2e-3
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"ids": [[[0, 1, 2]] * 4] * SAMPLES},
            r"Lists of lists, as of the tokens of a text, are not",
        ),
        ({"ids": [[0]] + [[0, 1, 2]] * (SAMPLES - 1)}, r"expected k numbers in every row"),
        ({"ids": [[0, 1, 9]] * SAMPLES}, r"has class id 9; expected 0 to 4"),
        ({"ids": [[0, 1, 1]] * SAMPLES}, r"names a class twice in row 0; expected each once"),
        ({"ids": [[0, 1]] * SAMPLES}, r"expected as many of each, and no more than classes"),
        (
            {"log_probs": [[0.0, 0.0, 0.0]] * SAMPLES},
            r"of sample 0 come to a sum of 3; expected at most",
        ),
    ],
)
def test_rows_that_are_no_classes_of_a_sample_are_refused(
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


def test_what_must_be_named_is_asked_for(
    data: str, tmp_path: Path, probabilities: npt.NDArray[np.float32]
) -> None:
    folder = top_rows(tmp_path / "rows", probabilities)
    good, out = f"hfds:{folder}?ids=ids&log_probs=log_probs", tmp_path / "c.h5"
    with pytest.raises(SettingsError, match=r"holds some classes of each row; add --classes"):
        import_labels(good, data=data, out=out)
    with pytest.raises(SettingsError, match=r"expected hfds:ID_OR_FOLDER\?ids=COLUMN&log_probs=C"):
        import_labels(f"hfds:{folder}?ids=ids", data=data, out=out, classes=CLASSES)
    with pytest.raises(SettingsError, match=r"has no column 'top'; it has ids, log_probs"):
        import_labels(good.replace("ids=ids", "ids=top"), data=data, out=out, classes=CLASSES)
    with pytest.raises(
        SettingsError, match=r"cnn:8: expected FILE\.npy, FILE\.npz, .*; a model is"
    ):
        import_labels("cnn:8", data=data, out=out)


@pytest.mark.parametrize("rows", [SAMPLES - 1, SAMPLES + 1])
def test_a_matrix_of_another_number_of_rows_is_refused(
    data: str, tmp_path: Path, rows: int
) -> None:
    np.save(tmp_path / "said.npy", np.zeros((rows, CLASSES), np.float32))
    with pytest.raises(
        ModelError, match=rf"has {rows} rows, npz:.* has 300 samples; expected a row"
    ):
        import_labels(str(tmp_path / "said.npy"), data=data, out=tmp_path / "c.h5")


def test_an_odd_temperature_is_refused(data: str, tmp_path: Path) -> None:
    np.save(tmp_path / "said.npy", np.zeros((SAMPLES, CLASSES), np.float32))
    for odd in (0.0, -1.0, math.nan):
        with pytest.raises(
            SettingsError, match=r"teacher-temperature is .*; expected a number above"
        ):
            DumpConfig(
                teacher="x.npy",
                data=data,
                temperature=1.0,
                teacher_temperature=odd,
                out=tmp_path / "c.h5",
            )


def test_the_commands_are_each_others_way_back(cache: Cache, data: str, tmp_path: Path) -> None:
    exported = tmp_path / "said.npy"
    run = CliRunner()
    assert run.invoke(main, ["export-labels", str(cache.path), "-o", str(exported)]).exit_code == 0
    result = run.invoke(
        main,
        ["import", str(exported), "--data", data, "--out", str(tmp_path / "b.h5"),
         "--holds", "probabilities", "--softened", "4"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "300 samples x 1 view(s), 5 classes, dense" in result.output
    again, at = open_cache(tmp_path / "b.h5"), np.arange(SAMPLES)
    np.testing.assert_allclose(again.rows(0, at), cache.rows(0, at), atol=2e-3)
    np.testing.assert_array_equal(again.keys, cache.keys)


def test_parquet_holds_sample_label_key_and_probabilities(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "said.parquet"
    said = export_labels(cache.path, out, temperature=2.0)
    assert said.endswith("probabilities of 300 samples, 5 classes, at temperature 2")
    table = pyarrow.parquet.read_table(out)
    assert table.column_names == ["sample", "label", "key", "probabilities"]
    at = np.arange(SAMPLES)
    rows = np.stack(table.column("probabilities").to_numpy())
    np.testing.assert_allclose(rows, np.exp(cache.rows(0, at, 2.0)), rtol=1e-6)
    np.testing.assert_array_equal(table.column("sample").to_numpy(), at)
    np.testing.assert_array_equal(table.column("label").to_numpy(), cache.labels)
    np.testing.assert_array_equal(table.column("key").to_numpy(), cache.keys)
    assert table.schema.metadata[b"softcache_content_id"].decode() == cache.content_id()
    logs = tmp_path / "logs.parquet"
    export_labels(cache.path, logs, log_probabilities=True)
    assert pyarrow.parquet.read_table(logs).column_names[-1] == "log_probabilities"

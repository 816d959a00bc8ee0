"""`softcache export-labels`: soft targets as a plain matrix, and back into a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import SettingsError
from softcache.files.export_labels import export_labels
from tests.conftest import Run


@pytest.mark.parametrize("encoding", ["dense", "topk:2", "basis:4,2"])
def test_the_matrix_is_what_the_cache_decodes_to(
    encoding: str, dump_config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softcache.files.export_labels.CHUNK_VALUES", 5 * 7)
    cache = dump(replace(dump_config, encoding=encoding, views=2, augment="shift:1"))
    for view, temperature in ((0, None), (1, 2.0)):
        export_labels(cache.path, tmp_path / "p.npy", view=view, temperature=temperature)
        matrix = np.load(tmp_path / "p.npy")
        expected = np.exp(cache.rows(view, np.arange(300), temperature))
        assert matrix.dtype == np.float32
        np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_there_and_back_is_the_same_cache_of_rows(
    cache: Cache, dump_config: DumpConfig, tmp_path: Path, run: Run
) -> None:
    output = run("export-labels", cache.path, "-o", "p.npy", "--temperature", 1, check=True).stdout
    assert (
        output
        == "p.npy: probabilities of 300 samples, 5 classes, at temperature 1; the samples are not augmented\n"
    )
    run("dump", "--teacher", "p.npy", "--teacher-output", "probabilities", "--data", dump_config.data,
        "--temperature", 4, "--out", "back.h5", check=True)  # fmt: skip
    from softcache.cache import open_cache

    back = open_cache(tmp_path / "back.h5")
    np.testing.assert_allclose(
        back.rows(0, np.arange(300)), cache.rows(0, np.arange(300)), atol=4e-3
    )


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("p.csv", {}, r"-o .*p\.csv: expected a name that ends in \.npy"),
        ("p.npy", {"view": 1}, r"view 1 of .*tiny\.h5; expected 0 to 0"),
        ("p.npy", {"temperature": 0.0}, r"temperature is 0\.0; expected a number above 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    out: str, options: dict[str, float], message: str, cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        export_labels(cache.path, tmp_path / out, **options)  # type: ignore[arg-type]
    assert not (tmp_path / out).exists()

"""DistillKit's compression: rows that it wrote, and the same layout from an independent encoder."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softcache.cache import TopK
from softcache.errors import ModelError, SettingsError
from softcache.files.import_labels import import_labels
from softcache.teachers.distillkit import Codec, parse_codec
from softcache.teachers.token_columns import Nested
from tests.token_files import (
    VOCABULARY,
    Record,
    Written,
    expected_rows,
    write_documents,
    write_parquet,
)

# two rows of 60 tokens, the 8 largest entries of each, as DistillKit packs them
CONFIGURATION: dict[str, Any] = {
    "d": 60, "k": 8, "exact_k": 3, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1],
    "term_dtype": "float32", "delta_encoding": False, "error_diffusion": False,
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 4}],
}  # fmt: skip
LOG_PROBS = [
    [128, 191, 222, 191, 23, 192, 154, 231, 41, 192, 36, 77, 73, 190, 207, 29, 195, 129, 96],
    [209, 191, 249, 191, 22, 192, 32, 46, 35, 192, 72, 98, 20, 190, 11, 27, 23, 244, 48],
]
IDS = [[13, 226, 193, 146, 234, 229], [6, 97, 42, 43, 98, 78]]
UNPACKED_IDS = [[3, 30, 11, 1, 36, 46, 43, 37], [1, 38, 4, 42, 10, 54, 9, 14]]
UNPACKED = [
    [-1.0, -1.7344, -2.3594, -2.6094, -2.8627, -3.1387, -3.2106, -3.4411],
    [-1.6328, -1.9453, -2.3438, -2.5978, -2.6431, -2.8051, -3.0291, -3.1293],
]


def rows(lists: list[list[int]]) -> Nested:
    return Nested(np.array([len(row) for row in lists]), np.concatenate(lists))


def test_rows_that_distillkit_packed() -> None:
    counts, ids, log_probs = parse_codec(CONFIGURATION).unpack(rows(IDS), rows(LOG_PROBS), "here")
    assert counts.tolist() == [8, 8]
    assert ids.reshape(2, 8).tolist() == UNPACKED_IDS
    # residuals are rounded to bfloat16 there
    np.testing.assert_allclose(log_probs.reshape(2, 8), UNPACKED, atol=2e-3)


def bits(numbers: list[int], width: int) -> list[int]:
    text = "".join(f"{number:0{width}b}" for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[n : n + 8], 2) for n in range(0, len(text), 8)]


def packed(document: Written, k: int) -> Record:
    """A document with two exact values, and the others as differences in steps of 1/64, from a polynomial."""
    ids, values = document.top(k)
    lists = []
    for row in values[:-1]:
        deltas = np.diff([0.0, *row])
        row_bytes = list(struct.pack("<2f", *deltas[:2])) + list(struct.pack("<2d", -0.25, 0.0))
        steps = np.clip(np.round((deltas[2:] + 0.25) * 64), -(1 << 9), (1 << 9) - 1).astype(int)
        row_bytes += list(struct.pack("<e", 1 / 64)) + bits((steps + (1 << 9)).tolist(), 10)
        lists.append(row_bytes)
    return {
        "input_ids": document.tokens,
        "compressed_logprobs": lists,
        "bytepacked_indices": [bits(row, 6) for row in ids[:-1]],
    }


DELTAS: dict[str, Any] = {
    "d": VOCABULARY, "k": 8, "exact_k": 2, "exact_dtype": "float32", "polynomial_terms": [0, "sqrt"],
    "term_dtype": "float64", "delta_encoding": True, "normalize_t": True,
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 10, "num_elements": 6}],
}  # fmt: skip


def test_a_file_of_packed_rows_is_imported(tmp_path: Path) -> None:
    documents = write_documents()
    file = write_parquet(tmp_path / "data_0.parquet", [packed(d, 8) for d in documents])
    options: dict[str, Any] = {
        "data": f"ids:{file}",
        "classes": VOCABULARY,
        "out": tmp_path / "c.h5",
    }
    with pytest.raises(
        SettingsError, match=r"is no .*compression_config\.yaml; name it with \?config="
    ):
        import_labels(str(file), **options)
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps({"logprob_compressor": DELTAS}))
    cache = import_labels(f"{file}?config={other}", **options)
    assert cache.header.encoding == TopK(8)
    stored = np.exp(cache.rows(0, np.arange(cache.header.row_count)))
    np.testing.assert_allclose(stored, expected_rows(documents), atol=0.02)
    other.rename(tmp_path / "compression_config.yaml")
    again = import_labels(f"hfds:{file}", **options, overwrite=True)
    np.testing.assert_array_equal(again.rows(0, np.arange(9)), cache.rows(0, np.arange(9)))
    (tmp_path / "compression_config.yaml").write_text(json.dumps(DELTAS | {"exact_k": 1, "k": 7}))
    with pytest.raises(ModelError, match=r"row 0 has 34 bytes of compressed_logprobs; expected 30"):
        import_labels(str(file), **options, overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exact_dtype": "int8"}, r"type int8; expected float16"),
        ({"exact_k": 9}, r"exact_k 9 and its bins do not fit"),
        ({"polynomial_terms": ["log"]}, r"polynomial term 'log'; expected sqrt, exp or"),
        ({"residual_bins": [CONFIGURATION["residual_bins"][0] | {"element_bits": 0}]}, r"do not fit"),
        ({"d": 1}, r"d 1, k 8"),
    ],
)  # fmt: skip
def test_a_configuration_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_codec(CONFIGURATION | change)


def test_rows_that_the_configuration_does_not_fit_are_refused() -> None:
    codec = parse_codec(CONFIGURATION)
    with pytest.raises(
        ModelError, match=r"here, row 1 has 18 bytes of compressed_logprobs; expected 19"
    ):
        codec.unpack(rows(IDS), rows([LOG_PROBS[0], LOG_PROBS[1][1:]]), "here")
    with pytest.raises(ModelError, match=r"has 2 rows of bytepacked_indices and 1 of compressed"):
        codec.unpack(rows(IDS), rows(LOG_PROBS[:1]), "here")
    with pytest.raises(ModelError, match=r"holds more than bytes; expected numbers from 0 to 255"):
        codec.unpack(rows(IDS), rows([[300, *LOG_PROBS[0][1:]], LOG_PROBS[1]]), "here")
    flat = Codec(
        d=60, k=8, exact_k=8, residual_bins=(), exact_dtype="float16", delta_encoding=False
    )
    zeros = [[0] * 16, [0] * 16]
    with pytest.raises(
        ModelError, match=r"row 0 has probabilities that sum to 8; .*of another file"
    ):
        flat.unpack(rows(IDS), rows(zeros), "here")


def test_the_legacy_compression_is_refused_by_name(tmp_path: Path) -> None:
    record = {
        "input_ids": [1, 2],
        "packed_indices": [[1]],
        "exact_values": [[0.0]],
        "coeffs": [[0.0]],
    }
    file = write_parquet(tmp_path / "t.parquet", [record])
    with pytest.raises(SettingsError, match=r"legacy compression, which is not read; decompress"):
        import_labels(str(file), data=f"ids:{file}", classes=60, out=tmp_path / "c.h5")

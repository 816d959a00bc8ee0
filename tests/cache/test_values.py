"""Values that no encoder writes are damage, though every digest matches: a file may have been forged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import open_cache
from softcache.cache.verify import find_damage
from softcache.cache.writer import digest_offset
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError
from softcache.files.verify import verify_cache
from softcache.train.loop import train
from softcache.train.options import make_train_config

ROW = 7  # that is changed
Values = npt.NDArray[Any]


def forged(path: Path, array_name: str, change: Callable[[Values], None]) -> None:
    """Change one row of an array, in the first view, and mend the digest of its block."""
    cache = open_cache(path)
    header = cache.header
    array = header.array(array_name)
    view = 0 if array.axis == "rows" else None
    values = np.array(cache.arrays[array_name][0] if view == 0 else cache.arrays[array_name])
    change(values[ROW] if values.ndim > 1 else values[ROW : ROW + 1])
    block = ROW // header.block_rows
    with path.open("r+b") as file:
        file.seek(array.offset + ROW * array.row_bytes)
        file.write(values[ROW : ROW + 1].tobytes())
    new = open_cache(path)
    digest = new.sample_digest(block) if view is None else new.block_digest(0, block)
    with path.open("r+b") as file:
        file.seek(digest_offset(header, view, block))
        file.write(digest.to_bytes(8, "little"))


def put(index: int | slice, value: float) -> Callable[[Values], None]:
    def change(values: Values) -> None:
        values[index] = value

    return change


def repeat(values: Values) -> None:
    values[1] = values[0]


CASES: dict[str, list[tuple[str, Callable[[Values], None], str]]] = {
    "dense": [
        ("log_probs", put(0, np.nan), "probabilities that sum to nan"),
        ("log_probs", put(0, np.inf), "probabilities that sum to nan"),
        ("log_probs", put(0, -np.inf), "probabilities that sum to nan"),
        ("log_probs", put(slice(None), -1.0), r"probabilities that sum to 1\.839"),
        ("log_probs", put(slice(None), -9.0), r"probabilities that sum to 0\.0006"),
        ("log_probs", put(0, 3.0), "probabilities that sum to nan"),
        ("labels", put(0, 5), "labels that are no classes"),
        ("labels", put(0, -2), "labels that are no classes"),
        ("labels", put(0, 1 << 40), "labels that are no classes"),
    ],
    "quantized": [
        ("ranges", put(0, np.nan), "ranges that are not finite and positive"),
        ("ranges", put(0, np.inf), "ranges that are not finite and positive"),
        ("ranges", put(0, -1), "ranges that are not finite and positive"),
        ("codes", put(slice(None), 9), "rows without a largest class"),
    ],
    "topk:3": [
        ("ids", repeat, "class ids twice in a row"),
        ("ids", put(0, 5), "class ids beyond the last class"),
        ("log_probs", put(0, np.nan), "probabilities that sum to nan"),
        ("log_probs", put(slice(None), -0.5), r"probabilities that sum to 1\.8"),
        ("tails", put(0, np.inf), "tails that are not finite"),
    ],
    "basis:3,2": [
        ("ids", repeat, "class ids twice in a row"),
        ("steps", put(0, np.nan), "steps that are not finite and positive"),
        ("steps", put(1, -1), "steps that are not finite and positive"),
    ],
    "bernoulli": [
        ("log_odds", put(0, np.nan), "log-odds that are not finite"),
        ("log_odds", put(2, -np.inf), "log-odds that are not finite"),
        ("label_sets", put(0, 0b1000_0001), "sets of labels with other than the classes"),
        ("labels", put(0, 3), "sets of labels with other than the classes"),
        ("labels", put(0, -2), "sets of labels with other than the classes"),
    ],
    "sampled:8": [("ids", put(3, 6), "class ids beyond the last class")],
}  # fmt: skip


@pytest.mark.must("F43", "F47", "F48")
@pytest.mark.parametrize(
    ("encoding", "array", "change", "what"),
    [(encoding, *case) for encoding, cases in CASES.items() for case in cases],
)
def test_what_cannot_be_is_damage_of_its_block(
    dump_config: DumpConfig, encoding: str, array: str, change: Callable[[Values], None], what: str
) -> None:
    temperature = 1.0 if encoding.startswith("sampled") else 4.0
    targets = "sigmoid" if encoding == "bernoulli" else "softmax"
    config = replace(
        dump_config, encoding=encoding, targets=targets, temperature=temperature, embed_inputs=True
    )
    path = dump(config).path
    assert not find_damage(open_cache(path))
    forged(path, array, change)
    (damage,) = find_damage(open_cache(path))
    assert ROW in (damage.samples or ())
    with pytest.raises(FormatError, match=rf"is damaged: {what}"):
        verify_cache(path)
    run = make_train_config(
        cache=path, student="mlp:4", epochs=1, out=path.parent / "run", device="cpu"
    )
    with pytest.raises(FormatError, match=rf"is damaged: {what}"):
        train(run)


def test_rows_of_very_many_classes_and_extreme_confidence_are_no_damage(
    tmp_path: Path, dump_config: DumpConfig, teacher_file: Path
) -> None:
    (tmp_path / "wide.py").write_text(
        "import torch\nclass Wide(torch.nn.Module):\n    def forward(self, x):\n"
        "        i = torch.arange(5000.0)\n        flat = x.flatten(1).sum(1, keepdim=True)\n"
        "        return torch.where(flat > flat.mean(), -i * 40, (i * 0.37 + flat).sin() * 0.01)\n"
        "def teacher(): return Wide()\n"
    )
    for encoding in ("dense", "quantized", "topk:50", "basis:4,2", "sampled:20"):
        config = replace(
            dump_config, teacher=f"{tmp_path / 'wide.py'}:teacher", weights=None, classes=None,
            eval_data=None, encoding=encoding, temperature=1.0, out=tmp_path / f"{encoding[:5]}.h5",
        )  # fmt: skip
        assert not find_damage(dump(config))

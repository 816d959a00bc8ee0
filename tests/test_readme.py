"""The code in the README runs as it stands, with a data set and a student of the reader's own."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from softcache.cache import open_cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from tests.conftest import make_arrays

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
NEEDED = {"plain": "torch", "transformers": "transformers", "lightning": "lightning"}


class Own(Dataset[tuple[Tensor, int]]):
    """The tiny data, as a reader might have them."""

    def __init__(self) -> None:
        self.images, self.labels = make_arrays()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[index]), int(self.labels[index])


@pytest.mark.parametrize(("name", "code"), [*zip(NEEDED, EXAMPLES, strict=True)], ids=[*NEEDED])
def test_an_example_teaches_the_student(
    name: str,
    code: str,
    dump_config: DumpConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(NEEDED[name])
    monkeypatch.chdir(tmp_path)
    cache = dump(replace(dump_config, views=2, augment="shift:1", out=tmp_path / "cache.h5"))
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def agreement() -> float:
        with torch.no_grad():
            said = student(torch.from_numpy(Own().images) / 255).argmax(-1).numpy()
        rows = open_cache(cache.path).rows(0, np.arange(300))
        return float((said == rows.argmax(-1)).mean())

    before = agreement()
    exec(compile(code, f"README, {name}", "exec"), {"dataset": Own(), "student": student})
    assert agreement() > before + 0.1


def test_each_is_short() -> None:
    assert len(EXAMPLES) == len(NEEDED)
    assert all(len(code.splitlines()) <= 26 for code in EXAMPLES)


def test_no_example_is_imported_by_softcache_itself() -> None:
    assert "softcache" in sys.modules
    assert not any(name in README.split("## Python")[0] for name in ("import lightning",))

"""The Python code in README and guide runs as it stands, with a reader's own data set and student."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from softcache.cache import open_cache
from softcache.data.loader import Request
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.join.joined_data import JoinedData
from tests.conftest import make_arrays

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "softcache" / "guide" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README + GUIDE, re.MULTILINE | re.DOTALL)
NEEDED = {
    "stages": "torch",
    "plain": "torch",
    "transformers": "transformers",
    "lightning": "lightning",
}

SMALL = """

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
"""


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
    data_file: Path,
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip(NEEDED[name])
    monkeypatch.chdir(tmp_path)
    if name == "stages":  # it makes the cache itself, from the reader's files
        Path("my_models.py").write_text(teacher_file.read_text() + SMALL)
        Path("digits.npz").write_bytes(data_file.read_bytes())
    else:
        dump(replace(dump_config, views=2, augment="shift:1", out=tmp_path / "cache.h5"))
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def agreement(model: nn.Module) -> float:
        with torch.no_grad():
            classes = model(torch.from_numpy(Own().images) / 255).argmax(-1).numpy()
        rows = open_cache(tmp_path / "cache.h5").rows(0, np.arange(300))
        return float((classes == rows.argmax(-1)).mean())

    views: set[tuple[int, int]] = set()
    request = JoinedData.request

    def recorded(joined: JoinedData, rows: npt.NDArray[np.int64], epoch: int) -> Request:
        made = request(joined, rows, epoch)
        chosen = np.broadcast_to(np.asarray(made.view), len(rows))
        views.update(zip(rows.tolist(), chosen.tolist(), strict=True))
        return made

    monkeypatch.setattr(JoinedData, "request", recorded)
    namespace = {"dataset": Own(), "student": student}
    before = 0.2 if name == "stages" else agreement(student)
    exec(compile(code, f"README or guide, {name}", "exec"), namespace)
    if name == "stages":
        students = [trained.final_model for trained in namespace["students"]]  # type: ignore[attr-defined]
        assert len(students) == 2
    else:
        students = [student]
    assert all(agreement(model) > before + 0.1 for model in students)
    if name != "stages":  # in two epochs, every sample is seen in both views
        assert len(views) == 2 * 300


def test_each_is_short() -> None:
    assert len(EXAMPLES) == len(NEEDED)
    assert all(len(code.splitlines()) <= 36 for code in EXAMPLES)


def test_no_example_is_imported_by_softcache_itself() -> None:
    assert "softcache" in sys.modules
    assert "import lightning" not in README
    assert "import lightning" in GUIDE

"""A teacher of trees that agrees with all labels was probably trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softcache.cache import open_cache
from tests.cli.app_cases import softcache

# estimators as scikit-learn has them: nearest neighbours in the place of trees that are grown to the end
MODELS = """
import numpy as np

class Neighbours:
    classes_ = np.array([0, 1])

    def __init__(self, path, step, trees):
        arrays = np.load(path)
        self.x, self.y = arrays["x"][::step], arrays["y"][::step]
        if trees:
            self.estimators_ = []

    def predict_proba(self, rows):
        nearest = ((rows[:, None] - self.x[None]) ** 2).sum(-1).argmin(1)
        return np.eye(2)[self.y[nearest]] * 0.98 + 0.01

def forest(): return Neighbours({path!r}, 1, True)
def half_forest(): return Neighbours({path!r}, 2, True)
def no_trees(): return Neighbours({path!r}, 1, False)
"""


@pytest.mark.parametrize(
    ("teacher", "hinted"), [("forest", True), ("half_forest", False), ("no_trees", False)]
)
def test_a_hint_at_out_of_fold_predictions(tmp_path: Path, teacher: str, hinted: bool) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 4)).astype(np.float32)
    y = (x[:, 0] + random.normal(size=200) > 0).astype(np.int64)
    path = tmp_path / "d.npz"
    np.savez(path, x=x, y=y)
    (tmp_path / "models.py").write_text(MODELS.replace("{path!r}", repr(str(path))))
    result = softcache(
        "dump", "--teacher", f"{tmp_path / 'models.py'}:{teacher}", "--data", f"npz:{path}", "-o",
        str(tmp_path / "c.h5"), "--strict",
    )  # fmt: skip
    assert result.exit_code == 0, result.output  # it may be right: a hint is no verdict
    lines = result.stderr.strip().splitlines()
    assert bool(lines and "Out-of-fold predictions" in lines[-1]) == hinted
    assert "warnings" not in (open_cache(tmp_path / "c.h5").header.summary or {})

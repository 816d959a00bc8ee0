"""A teacher of trees that agrees with all labels was probably trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softcache.cache import open_cache
from tests.cli.app_cases import softcache

pytest.importorskip("sklearn")

TREES = """
import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

def data():
    arrays = np.load({path!r})
    return arrays["x"], arrays["y"]

def forest():
    return RandomForestClassifier(10, bootstrap=False, random_state=0).fit(*data())

def half_forest():
    x, y = data()
    return RandomForestClassifier(10, random_state=0).fit(x[::2], y[::2])

def linear():
    x, y = data()
    return LogisticRegression().fit(x, x[:, 0] > 0)
"""


@pytest.mark.parametrize(
    ("teacher", "hinted"), [("forest", True), ("half_forest", False), ("linear", False)]
)
def test_a_hint_at_out_of_fold_predictions(tmp_path: Path, teacher: str, hinted: bool) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 4)).astype(np.float32)
    y = (x[:, 0] + random.normal(size=200) > 0).astype(np.int64)
    if teacher == "linear":
        y = (x[:, 0] > 0).astype(np.int64)  # agrees with all labels, but is no tree
    np.savez(tmp_path / "d.npz", x=x, y=y)
    (tmp_path / "trees.py").write_text(TREES.format(path=str(tmp_path / "d.npz")))
    result = softcache(
        "dump", "--teacher", f"{tmp_path / 'trees.py'}:{teacher}", "--data",
        f"npz:{tmp_path / 'd.npz'}", "-o", str(tmp_path / "c.h5"), "--strict",
    )  # fmt: skip
    assert result.exit_code == 0, result.output  # it may be right: a hint is no verdict
    last = result.stderr.strip().splitlines()[-1]
    assert ("Out-of-fold predictions" in last) == hinted
    assert "warnings" not in (open_cache(tmp_path / "c.h5").header.summary or {})

"""The names of a teacher's outputs, stated in its specification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.errors import SettingsError
from softcache.teachers.load import load_teacher
from softcache.teachers.spec import parse_teacher
from tests.cli.app_cases import softcache
from tests.cli.test_impossible_numbers import MODELS, agreement, dumped, write_folder

NAMES = "classes=b,c%20d,a"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (f"m.py:make?{NAMES}", {}),
        (f"m.py:make?{NAMES}&normalize=imagenet", {"normalize": "imagenet"}),
        (f"m.py:make?normalize=imagenet&{NAMES}", {"normalize": "imagenet"}),
        (f"mlp:8?{NAMES}", {}),
        (f"hf:bert?{NAMES}&length=9", {"length": "9"}),
        (f"x/m.onnx?{NAMES}", {}),
        (f"x/m.pt2?{NAMES}", {}),
        (f"x/m.npy?{NAMES}", {}),
        (f"hfds:d?ids=i&{NAMES}&log_probs=l@test", {"ids": "i", "log_probs": "l"}),
        (f"hfds:d?ids=i&log_probs=l&{NAMES}@test", {"ids": "i", "log_probs": "l"}),
    ],
)
def test_every_kind_of_teacher_takes_them(text: str, options: dict[str, str]) -> None:
    spec = parse_teacher(text)
    assert spec.options == options | {"classes": "b,c d,a"}
    assert spec.text == text
    assert "classes=b,c d,a" in spec.public_name
    assert spec.split == ("test" if "@" in text else "")


def test_no_model_is_told_of_every_kind_of_teacher() -> None:
    with pytest.raises(SettingsError, match=r"expected mlp:SIZES.*FILE\.onnx.*FILE\.npy"):
        parse_teacher("nothing")


def load(tmp_path: Path, query: str, select: str | None = None) -> tuple[tuple[str, ...], Tensor]:
    (tmp_path / "m.py").write_text(
        "import torch\nclass M(torch.nn.Module):\n    class_names = ('x', 'y', 'z')\n"
        "    def forward(self, x): return x\ndef make(): return M()\n"
    )
    sample = torch.tensor([[1.0, 2, 3]])
    teacher = load_teacher(
        f"{tmp_path / 'm.py'}:make{query}",
        None,
        sample=sample,
        classes=2,
        device=torch.device("cpu"),
        precision="fp32",
        select=select,
    )
    return teacher.class_names, teacher.logits(sample)


def test_they_take_the_place_of_the_models_own(tmp_path: Path) -> None:
    assert load(tmp_path, "")[0] == ("x", "y", "z")
    assert load(tmp_path, "?classes=a,b,c")[0] == ("a", "b", "c")
    names, logits = load(tmp_path, "?classes=a,b,c", select="c,a")
    assert names == ("c", "a")
    assert logits.tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?classes=a,b", r"classes= has 2 names, and its output has 3 columns; name each column"),
        ("?classes=a,a,b", r"classes has 'a' twice"),
        ("?classes=", r"classes has an empty name"),
    ],
)
def test_they_must_name_every_output(tmp_path: Path, query: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(tmp_path, query)


def test_labels_are_mapped_by_them(tmp_path: Path) -> None:
    models = tmp_path / "lines.py"
    models.write_text(MODELS)
    data = f"folder:{write_folder(tmp_path / 'd', ['a', 'b', 'c'])}"
    # the first output is the line of c, the second that of a, the third that of b
    permuted = MODELS.replace('["c", "a", "b"]', "()")
    models.write_text(permuted)
    cache = dumped(models, "permuted?classes=c,a,b", data)
    assert agreement(cache) == 1
    assert cache.class_names == ["c", "a", "b"]
    out = str(tmp_path / "other.h5")
    arguments = ["dump", "--teacher", f"{models}:permuted", "--data", data, "-o", out]
    result = softcache(*arguments)
    assert "warning" in result.stderr  # without the names, the outputs are those of other classes


def test_a_matrix_takes_them_on_import(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = np.array(["ant", "bee", "cat"])[random.integers(0, 3, 60)]
    (tmp_path / "d.csv").write_text(
        "x,label\n" + "".join(f"{n},{word}\n" for n, word in enumerate(words))
    )
    columns = ["cat", "ant", "bee"]
    matrix = np.stack([8.0 * (words == name) for name in columns], 1).astype(np.float32)
    np.save(tmp_path / "m.npy", matrix)
    arguments = ["--data", f"csv:{tmp_path / 'd.csv'}", "-o", str(tmp_path / "c.h5")]
    refused = softcache("import", f"{tmp_path / 'm.npy'}", *arguments)
    assert refused.exit_code != 0
    result = softcache(
        "import", f"{tmp_path / 'm.npy'}?classes=cat,ant,bee", *arguments, "--overwrite"
    )
    assert result.exit_code == 0, result.output

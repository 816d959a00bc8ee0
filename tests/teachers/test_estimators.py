"""Estimators with scikit-learn's methods as teachers, of tables and of texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softcache.data.text import encode
from softcache.errors import ModelError, SettingsError
from softcache.teachers.load import load_teacher
from softcache.teachers.teacher import Teacher

INPUTS = torch.rand(16, 2, 3, generator=torch.Generator().manual_seed(0))
Z = 5 * INPUTS.flatten(1)[:, :3]

ESTIMATORS = '''
import numpy as np

def softmax(z):
    p = np.exp(z.astype(float))
    return p / p.sum(1, keepdims=True)

class Proba:
    """As scikit-learn's classifiers."""
    n_features_in_ = 6

    def __init__(self, *classes, **attributes):
        self.classes_ = np.array(classes)
        self.__dict__.update(attributes)

    def predict_proba(self, X):
        assert X.dtype == np.float32
        if X.shape[1:] != (self.n_features_in_,):
            raise ValueError(f"X has {X.shape[1]} features,\\nbut Proba is expecting {self.n_features_in_}")
        return softmax(5 * X[:, :3])

class Decision:
    def __init__(self, width, classes):
        self.width, self.classes_ = width, np.arange(classes)

    def decision_function(self, X):
        z = 5 * X[:, :max(1, self.width)] - 2
        return z if self.width else z[:, 0]

class Several:
    classes_ = [np.arange(2), np.arange(2)]

    def predict_proba(self, X):
        return [np.full((len(X), 2), 0.5)] * 2

class Words:
    classes_ = np.array(["bad", "good"])

    def predict_proba(self, texts):
        assert isinstance(texts, list) and isinstance(texts[0], str)
        p = np.array([0.9 if "good" in text else 0.1 for text in texts])
        return np.stack([1 - p, p], 1)

class Pipeline:
    def __init__(self, *steps):
        self.steps = [("", step) for step in steps]

    def predict_proba(self, X):
        return self.steps[-1][1].predict_proba(X)

class Single(Proba):
    def predict_proba(self, X):
        return np.ones((len(X), 1))

instance = Proba(0, 1, 2)
def numbers(): return Proba(0, 1, 2)
def names(): return Proba("basic", "gold", "silver")
def objects(): return Proba(*np.array(["basic", "gold", "silver"], object))
def shifted(): return Proba(1, 2, 3)
def wider(): return Proba(0, 1, 2, n_features_in_=8)
def named_columns(): return Proba(0, 1, 2, feature_names_in_=np.array(list("abcdef"), object))
def binary(): return Decision(0, 2)
def one_to_rest(): return Decision(3, 3)
def one_to_one(): return Decision(6, 4)
def several(): return Several()
def lonely(): return Single(0)
def tree(): return Proba(0, 1, 2, tree_=1)
def forest(): return Proba(0, 1, 2, estimators_=[])
def boosted(): return Proba(0, 1, 2, get_booster=len)
def pipeline(): return Pipeline(1, tree())
def search(): return Proba(0, 1, 2, best_estimator_=forest())
def words(): return Words()
def function(): return lambda texts: np.array([[len(t), 0.0] for t in texts])
number = 3
'''


@pytest.fixture
def code(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "e.py").write_text(ESTIMATORS)
    yield str(tmp_path / "e.py")
    for name in [name for name in sys.modules if name.startswith("softcache_user_e_")]:
        del sys.modules[name]


def load(spec: str, sample: Tensor = INPUTS[:1], **options: Any) -> Teacher:
    device = torch.device("cpu")
    options = {"classes": None} | options
    return load_teacher(spec, None, sample=sample, device=device, precision="fp32", **options)


@pytest.mark.parametrize("name", ["numbers", "instance", "names"])
@pytest.mark.parametrize("classes", [3, None])
def test_an_estimator_is_taken_as_it_is(name: str, classes: int | None, code: str) -> None:
    teacher = load(f"{code}:{name}", classes=classes)
    assert teacher.output == "probabilities"
    assert teacher.provenance["output"] == "probabilities"
    torch.testing.assert_close(teacher.logits(INPUTS).softmax(1), Z.softmax(1))


@pytest.mark.parametrize("name", ["names", "objects"])
def test_classes_that_are_words_are_names(name: str, code: str) -> None:
    assert load(f"{code}:{name}").class_names == ("basic", "gold", "silver")
    assert load(f"{code}:numbers").class_names == ()


def test_classes_that_do_not_count_from_0_are_told(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load(f"{code}:numbers")
    assert "numbered" not in capsys.readouterr().err
    load(f"{code}:shifted")
    told = capsys.readouterr().err
    assert "e.py:shifted: its classes are numbered 1, 2, 3, and not from 0 on" in told


def test_another_number_of_columns_is_refused_by_the_estimator(code: str) -> None:
    with pytest.raises(
        ModelError,
        match=r"e\.py:wider raised ValueError on samples .*: X has 6 features, but Proba is expecting 8$",
    ):
        load(f"{code}:wider")


def test_names_of_columns_are_known(code: str) -> None:
    assert load(f"{code}:named_columns").feature_names == tuple("abcdef")
    assert load(f"{code}:numbers").feature_names == ()


def test_a_binary_decision_function_is_a_logit(
    code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load(f"{code}:binary", classes=2)
    assert teacher.output == "logits"
    z = 5 * INPUTS.flatten(1)[:, 0] - 2
    torch.testing.assert_close(teacher.logits(INPUTS), torch.stack([torch.zeros(16), z], 1))
    assert "the logit of class 1" in capsys.readouterr().out
    torch.testing.assert_close(load(f"{code}:one_to_rest").logits(INPUTS), Z - 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "one_to_one",
            r"decision_function returns 6 columns for 4 classes; expected one for each class",
        ),
        (
            "several",
            r"predict_proba returns 2 arrays, one for each label; several labels per sample are not",
        ),
        ("lonely", r"the estimator knows only the class 0; expected at least 2 classes"),
    ],
)
def test_outputs_that_are_not_one_for_each_class_are_refused(
    name: str, message: str, code: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"e\.py:{name} raised ValueError on samples 0 to 0, .*{message}"
    ):
        load(f"{code}:{name}")


def test_what_is_neither_callable_nor_an_estimator_is_refused(code: str) -> None:
    with pytest.raises(SettingsError, match=r"model .*e\.py:number: .* has no callable 'number'"):
        load(f"{code}:number")
    with pytest.raises(
        SettingsError, match=r"model .*e\.py:gone: .* has no callable 'gone'; expected"
    ):
        load(f"{code}:gone")


def test_a_file_that_fails_is_named_with_the_callable(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(
        SettingsError, match=r"model .*bad\.py:clf: .* fails on import with ZeroDiv"
    ):
        load(f"{tmp_path / 'bad.py'}:clf")


@pytest.mark.parametrize("name", ["tree", "forest", "boosted", "pipeline", "search"])
def test_trees_are_known(name: str, code: str) -> None:
    assert load(f"{code}:{name}").is_tree
    assert load(f"{code}:{name}?mean=0&std=1").is_tree


@pytest.mark.parametrize("name", ["numbers", "binary", "instance"])
def test_others_are_no_trees(name: str, code: str) -> None:
    assert not load(f"{code}:{name}").is_tree


TEXTS = ["a good film", "bad", "good", "so-so"]


def test_an_estimator_of_texts_gets_a_list(code: str) -> None:
    points = encode(TEXTS, 12)
    teacher = load(f"{code}:words", points[:1], text=True)
    assert teacher.class_names == ("bad", "good")
    torch.testing.assert_close(
        teacher.logits(points).softmax(1)[:, 1], torch.tensor([0.9, 0.1, 0.9, 0.1])
    )


def test_a_function_of_texts_gets_a_list_too(code: str) -> None:
    points = encode(TEXTS, 12)
    logits = load(f"{code}:function", points[:1], text=True).logits(points)
    assert logits[:, 0].tolist() == [len(text) for text in TEXTS]


def test_without_the_flag_it_gets_numbers(code: str) -> None:
    with pytest.raises(ModelError, match=r"e\.py:words raised AssertionError on samples 0 to 0"):
        load(f"{code}:words", encode(TEXTS, 12)[:1])


def test_scikit_learn_itself(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "sk.py").write_text(
        "import numpy as np\n"
        "from sklearn.ensemble import RandomForestClassifier\n"
        "x = np.random.default_rng(0).random((60, 6))\n"
        "def forest():\n"
        "    y = np.array(['b', 'a', 'c'])[(3 * x[:, 0]).astype(int)]\n"
        "    return RandomForestClassifier(5, random_state=0).fit(x, y)\n"
    )
    teacher = load(f"{tmp_path / 'sk.py'}:forest")
    assert (teacher.class_names, teacher.is_tree) == (("a", "b", "c"), True)
    assert torch.allclose(teacher.logits(INPUTS).exp().sum(1), torch.ones(16))

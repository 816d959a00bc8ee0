"""What a teacher returns: named logits, one output for two classes, and what cannot be logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.dump.config import AUTO, DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError
from softcache.teachers.batch_size import fastest_batch
from softcache.teachers.ensemble import make_ensemble
from softcache.teachers.load import load_teacher
from softcache.teachers.outputs import as_logits, two_columns
from softcache.teachers.teacher import Teacher

INPUTS = torch.rand(16, 6, generator=torch.Generator().manual_seed(0))
Z = 20 * (INPUTS[:, :3] - 0.5)  # the teachers' logits

MODELS = """
import numpy as np
import torch
from torch import nn
from types import SimpleNamespace

class Model(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        z = 20 * (x[:, :3] - 0.5)
        return eval(self.answer, globals(), {"z": z})

def named(): return Model("SimpleNamespace(logits=z, hidden_states=None)")
def mapping(): return Model("{'loss': z.sum(), 'logits': z}")
def pair(): return Model("(z, z)")
def sigmoid(): return Model("z.sigmoid()")
def softmax(): return Model("z.softmax(1)")
def rounded(): return Model("(z.softmax(1) * 100).round() / 100")
def zeros(): return Model("0 * z")
def one(): return Model("z[:, :1]")
def flat(): return Model("z[:, 0]")
def squeezed(): return Model("z[:, :1].squeeze()")
def one_sigmoid(): return Model("z[:, :1].sigmoid()")
def one_log(): return Model("nn.functional.logsigmoid(z[:, 0])")
def labels(): return Model("z.argmax(1)")
def bytes_(): return Model("(255 * z.softmax(1)).to(torch.uint8)")
def infinite(): return Model("z / 0")
def function(): return lambda x: 20 * (x[:, 0] - 0.5)
def function_labels(): return lambda x: (20 * (x[:, :3] - 0.5)).argmax(1)
def function_bytes(): return lambda x: (255 * x).astype(np.uint8)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "m.py").write_text(MODELS)
    return tmp_path / "m.py"


def load(spec: str, classes: int | None = None, **options: Any) -> Teacher:
    return load_teacher(
        spec,
        None,
        sample=INPUTS[:1],
        classes=classes,
        device=torch.device("cpu"),
        precision="fp32",
        **options,
    )


# named logits


@pytest.mark.parametrize("name", ["named", "mapping"])
def test_logits_that_a_model_names_are_taken(name: str, models: Path) -> None:
    torch.testing.assert_close(load(f"{models}:{name}").logits(INPUTS), Z)


def test_a_tuple_is_refused(models: Path) -> None:
    with pytest.raises(ModelError, match=r"returns tuple for samples 0 to 0; expected .*: wrap it"):
        load(f"{models}:pair")


# one output for two classes


@pytest.mark.parametrize("classes", [2, None])
@pytest.mark.parametrize("name", ["one", "flat", "squeezed", "function"])
def test_one_output_is_the_logit_of_class_1(
    name: str, classes: int | None, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load(f"{models}:{name}", classes)
    assert teacher.classes == 2
    logits = teacher.logits(INPUTS)
    torch.testing.assert_close(logits, torch.stack([torch.zeros(16), Z[:, 0]], 1))
    torch.testing.assert_close(logits.softmax(1)[:, 1], Z[:, 0].sigmoid())
    teacher.logits(INPUTS)
    message = "returns one output per sample; it is taken as the logit of class 1, against 0 for"
    assert capsys.readouterr().out.count(message) == 1


@pytest.mark.parametrize(
    ("name", "output"), [("one_sigmoid", "probabilities"), ("one_log", "log_probabilities")]
)
def test_one_output_may_be_a_probability(name: str, output: str, models: Path) -> None:
    logits = load(f"{models}:{name}", output=output).logits(INPUTS)
    p = Z[:, 0].sigmoid()
    torch.testing.assert_close(logits.softmax(1), torch.stack([1 - p, p], 1), atol=1e-5, rtol=1e-4)


def test_certainty_is_finite() -> None:
    p = torch.tensor([0.0, 1.0])
    for output, values in (("probabilities", p), ("log_probabilities", p.log())):
        logits = as_logits(two_columns(values, output, "x"), output, "x")
        assert logits.isfinite().all()
        torch.testing.assert_close(logits.softmax(1)[:, 1], p)


@pytest.mark.parametrize("name", ["one", "flat", "function"])
def test_one_output_is_refused_for_more_classes(name: str, models: Path) -> None:
    with pytest.raises(ModelError, match=r"returns shape \(1,( 1)?\) .*; expected .*\(1, 3\)"):
        load(f"{models}:{name}", 3)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_one_output_that_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(
        ModelError,
        match=r"as the one output of a sample; expected the probability of class 1, or say",
    ):
        two_columns(torch.tensor([0.5, value]), "probabilities", "x")


def test_a_matrix_may_have_one_column(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", Z[:, :1].numpy())
    logits = load(str(tmp_path / "z.npy"), 2).logits(INPUTS)
    torch.testing.assert_close(logits[:, 1], Z[:, 0])


# what cannot be logits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sigmoid", r"only values between 0 and 1, in rows that do not sum to 1: outputs of a sigmoid"),
        ("softmax", r"sum to 1: probabilities, not logits, .*; add --teacher-output probabilities"),
        ("rounded", r"sum to 1: probabilities, not logits, .*; add --teacher-output probabilities"),
        ("one_sigmoid", r"one output per sample, each between 0 and 1: .*; add --teacher-output"),
    ],
)  # fmt: skip
def test_probabilities_are_not_logits(name: str, message: str, models: Path) -> None:
    teacher = load(f"{models}:{name}")
    teacher.logits(INPUTS[:7])  # too few rows to rule out a coincidence
    with pytest.raises(ModelError, match=rf"m\.py:{name} returns .*{message}"):
        teacher.logits(INPUTS)


def test_the_advice_for_sigmoids_names_what_is_missing(models: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"return the values before the sigmoid \(where rows sum to 1, add --teacher-output "
        r"probabilities\); if a sample may have several, add --targets sigmoid --teacher-output prob",
    ):
        load(f"{models}:sigmoid").logits(INPUTS)


def test_a_new_layer_that_returns_zeros_is_no_sigmoid(models: Path) -> None:
    assert torch.equal(load(f"{models}:zeros").logits(INPUTS), 0 * Z)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels", r"returns one integer per sample for samples 0 to 0: labels, not logits; return its prob"),
        ("function_labels", r"returns one integer per sample for samples 0 to 0: labels, not logits"),
        ("bytes_", r"returns unsigned 8-bit integers .*, which are neither logits nor probabilities"),
        ("function_bytes", r"returns unsigned 8-bit integers .*, which are neither logits nor prob"),
        ("infinite", r"returns -?inf for sample 0, class 0; expected finite .*, which an infinity cannot be"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("classes", [None, 3])
def test_other_numbers_are_refused(
    name: str, message: str, classes: int | None, models: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        load(f"{models}:{name}", 6 if classes and name == "function_bytes" else classes)


def test_a_matrix_of_bytes_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.zeros((16, 3), np.uint8))
    with pytest.raises(
        ModelError,
        match=r"z\.npy holds unsigned 8-bit integers \(16, 3\), which are neither logits nor probabilities",
    ):
        load(str(tmp_path / "z.npy"))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_matrix_with_an_infinity_is_refused(value: float, tmp_path: Path) -> None:
    values = Z.numpy().copy()
    values[0, 1] = value
    np.save(tmp_path / "z.npy", values)
    with pytest.raises(
        ModelError, match=r"returns -?inf for sample 0, class 1; .* infinity cannot be"
    ):
        load(str(tmp_path / "z.npy"))


def test_rounded_probabilities_are_divided_by_their_sum_and_it_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.array([[0.33, 0.33, 0.33], [0.34, 0.34, 0.34], [0.5, 0.25, 0.25]] * 4, np.float32)
    np.save(tmp_path / "p.npy", rows)
    teacher = load(str(tmp_path / "p.npy"), output="probabilities")
    probabilities = teacher.logits(INPUTS[:12]).softmax(1)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(12))
    torch.testing.assert_close(probabilities, torch.from_numpy(rows / rows.sum(1, keepdims=True)))
    replace(teacher, precision="fp32").logits(INPUTS[:12])
    out = capsys.readouterr().out
    assert out.count("returns probabilities that sum to") == 1
    assert "as if they were rounded; each row is divided by its sum" in out


def test_exact_probabilities_are_taken_in_silence(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(f"{models}:softmax", output="probabilities").logits(INPUTS)
    assert capsys.readouterr().out == ""


def test_sums_beyond_rounding_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.full((16, 3), 0.32, np.float32))
    with pytest.raises(
        ModelError, match=r"does not hold probabilities: its probabilities sum to 0\.96"
    ):
        load(str(tmp_path / "p.npy"), output="probabilities")


# the batch size


@pytest.mark.parametrize("rows", [1, 16, 40, 300])
def test_a_matrix_has_a_batch_size_whatever_its_rows(rows: int, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(0, 1, (rows, 3)).astype("f4"))
    ensemble = make_ensemble([load(str(tmp_path / "z.npy"))], [])
    size = fastest_batch(lambda inputs: ensemble.log_probs(inputs, 1.0), INPUTS[:1])
    assert size == 1 if rows < 32 else 32 <= size <= rows


def test_no_batch_beyond_the_largest_is_tried() -> None:
    sizes = list[int]()

    def teacher(inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(inputs))
        return inputs

    fastest_batch(teacher, INPUTS[:1], largest=64)
    assert max(sizes) <= 64


def test_a_matrix_is_dumped_with_batch_size_auto(dump_config: DumpConfig, tmp_path: Path) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (300, 5)).astype("f4")
    np.save(tmp_path / "z.npy", logits)
    settings = replace(
        dump_config, teacher=str(tmp_path / "z.npy"), eval_data=None, batch_size=AUTO
    )
    rows = dump(settings).rows(0, np.arange(300))
    expected = torch.log_softmax(torch.from_numpy(logits) / 4.0, -1)
    np.testing.assert_allclose(rows, expected, atol=4e-3)

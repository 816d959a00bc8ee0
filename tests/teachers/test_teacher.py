"""The teacher: its outputs are checked, and its provenance identifies it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from softcache.errors import ModelError, SettingsError
from softcache.models.builtin import mlp
from softcache.models.weights import state_sha256
from softcache.teachers.load import load_teacher
from softcache.teachers.teacher import Teacher

CPU = torch.device("cpu")
SAMPLE = torch.zeros(1, 1, 8, 8)

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x):
        z = self.linear(x.flatten(1))
        return {answer}

def teacher():
    return Model()
"""


def load(
    spec: str, weights: Path | None = None, classes: int | None = 5, precision: str = "fp32"
) -> Teacher:
    return load_teacher(
        spec, weights, sample=SAMPLE, classes=classes, device=CPU, precision=precision
    )


def write_teacher(folder: Path, answer: str = "z") -> str:
    """The specification of a teacher that returns the expression `answer` of its logits z."""
    path = folder / "models.py"
    path.write_text(MODEL.format(answer=answer))
    return f"{path}:teacher"


def write_module(folder: Path, expression: str) -> str:
    """The specification of a callable that returns the expression."""
    path = folder / "models.py"
    path.write_text(
        f"import torch\nfrom torch import nn\n\ndef teacher():\n    return {expression}\n"
    )
    return f"{path}:teacher"


def save_mlp(path: Path, hidden: tuple[int, ...] = (16,), classes: int = 5, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(mlp((1, 8, 8), hidden, classes).state_dict(), path)
    return path


WRONG_OUTPUTS = [
    ("z * float('nan')", r"returns nan for sample 0, class 0; expected finite logits"),
    (
        "z.abs() / 0",
        r"returns inf for sample 0, class 0; expected finite logits, which an infinity cannot be",
    ),
    (
        "-z.abs() / 0",
        r"returns -inf for sample 0, class 0; expected finite logits, which an infinity cannot be: give an "
        "impossible class a large negative logit",
    ),
    ("(z, z)", r"returns tuple for samples 0 to 0; expected .*\(1, 5\): wrap it"),
    ("{'scores': z}", r"returns dict for samples 0 to 0; expected .*\(1, 5\): wrap it"),
    ("z.numpy()", r"returns ndarray for samples 0 to 0; expected .*\(1, 5\): wrap it"),
    ("z[:, :3]", r"returns shape \(1, 3\) for samples 0 to 0; expected .*\(1, 5\)"),
    ("torch.cat([z, z], 1)", r"returns shape \(1, 10\) for samples 0 to 0; expected .*\(1, 5\)"),
    ("z[:, :1]", r"returns shape \(1, 1\) for samples 0 to 0; expected .*\(1, 5\)"),
    ("z[:, 0]", r"returns shape \(1,\) for samples 0 to 0; expected .*\(1, 5\)"),
    ("z[None]", r"returns shape \(1, 1, 5\) for samples 0 to 0; expected .*\(1, 5\)"),
    ("z[0]", r"returns shape \(5,\) for samples 0 to 0; expected .*\(1, 5\)"),
    ("z @ z", r"raised RuntimeError on samples 0 to 0, inputs \(1, 1, 8, 8\) of torch.float32: "),
]


@pytest.mark.parametrize(("answer", "message"), WRONG_OUTPUTS)
def test_a_wrong_output_is_refused_before_the_dump(
    answer: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        load(write_teacher(tmp_path, answer))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "z @ z",
            r"raised RuntimeError on samples 0 to 0, inputs \(1, 1, 8, 8\)",
        ),
        (
            "(z, z)",
            r"returns tuple for samples 0 to 0; expected .*\(1, (?!0\))",
        ),
        (
            "z[None]",
            r"returns shape \(1, 1, 5\) for samples 0 to 0; expected .*\(1, (?!0\))",
        ),
        (
            "z[:, :0]",
            r"returns outputs of width 0; expected at least 2 classes",
        ),
        ("z * float('nan')", r"returns nan for sample 0, class 0; expected finite logits"),
    ],
)
def test_a_wrong_output_is_refused_where_no_width_was_declared(
    answer: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        load(write_teacher(tmp_path, answer), classes=None)


def test_a_good_output_is_taken_and_its_width_found(tmp_path: Path) -> None:
    teacher = load(write_teacher(tmp_path), classes=None)
    assert teacher.classes == 5
    assert teacher.logits(torch.rand(3, 1, 8, 8)).shape == (3, 5)


def test_a_bad_value_is_placed_by_sample_and_class(tmp_path: Path) -> None:
    # NaN where the first pixel is 1, so not on the trial sample, which is all zeros
    spec = write_teacher(
        tmp_path, "torch.where(x[:, 0, 0, :1] * torch.eye(5)[2] == 1, torch.nan, z)"
    )
    teacher = load(spec)
    inputs = torch.zeros(8, 1, 8, 8)
    inputs[3] = 1
    with pytest.raises(ModelError, match=r"models\.py:teacher returns nan for sample 67, class 2;"):
        teacher.logits(inputs, np.arange(64, 72))


def test_an_error_of_the_teacher_is_told_in_one_line_with_the_samples(tmp_path: Path) -> None:
    spec = write_teacher(tmp_path, "z if len(x) == 1 else nn.Linear(1, 1)(z)")
    teacher = load(spec)
    with pytest.raises(ModelError, match="raised RuntimeError on samples 128 to 131, ") as raised:
        teacher.logits(torch.zeros(4, 1, 8, 8), np.arange(128, 132))
    assert "\n" not in str(raised.value)


def test_an_error_in_building_the_teacher_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"^model .*models\.py:teacher: the callable raised ZeroDivisionError: .* by zero; it is "
        "called with no arguments$",
    ):
        load(write_module(tmp_path, "1 // 0"))


def test_a_callable_that_returns_no_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"returned int; expected a torch nn\.Module"):
        load(write_module(tmp_path, "42"))


def test_a_callable_that_is_not_there_is_named(tmp_path: Path) -> None:
    spec = write_module(tmp_path, "42").replace(":teacher", ":student")
    with pytest.raises(SettingsError, match=r"models\.py has no callable 'student'"):
        load(spec)


@pytest.mark.parametrize("spec", ["mlp:16", "cnn:8", "resnet:8,4"])
def test_a_built_in_teacher_without_weights_is_refused(spec: str) -> None:
    with pytest.raises(
        SettingsError,
        match=f"teacher {spec} would be untrained; name its weights file with --weights",
    ):
        load(spec)


def test_a_built_in_teacher_takes_its_width_from_its_weights(tmp_path: Path) -> None:
    weights = save_mlp(tmp_path / "teacher.safetensors", classes=7)
    teacher = load("mlp:16", weights, classes=None)
    torch.manual_seed(0)
    same = mlp((1, 8, 8), (16,), 7)
    inputs = torch.rand(4, 1, 8, 8)
    assert torch.equal(teacher.logits(inputs), same(inputs))


def test_a_deep_perceptron_takes_its_width_from_its_last_layer(tmp_path: Path) -> None:
    weights = save_mlp(tmp_path / "teacher.safetensors", hidden=(9,) * 6, classes=5)
    assert load("mlp:9,9,9,9,9,9", weights, classes=None).classes == 5


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    weights = save_mlp(tmp_path / "teacher.safetensors", hidden=(16, 16))
    with pytest.raises(
        ModelError,
        match=r"teacher\.safetensors do not fit the model: 5\.bias is not in the model; .*"
        r"3\.bias is \(16,\) in the file, \(5,\) in the model; ",
    ):
        load("mlp:16", weights)


@pytest.mark.parametrize("classes", [5, None])
def test_the_teacher_is_in_eval_mode_from_its_first_sample_on(
    classes: int | None, tmp_path: Path
) -> None:
    spec = write_module(
        tmp_path,
        "nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 5)).train()",
    )
    teacher = load(spec, classes=classes)
    norm = teacher.model.get_submodule("1")
    assert isinstance(norm, torch.nn.BatchNorm1d)
    inputs = torch.rand(16, 1, 8, 8)
    assert torch.equal(teacher.logits(inputs), teacher.logits(inputs))  # dropout draws nothing
    assert norm.num_batches_tracked == 0
    # the same checks fail in train mode
    teacher.model.train()
    assert not torch.equal(teacher.logits(inputs), teacher.logits(inputs))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_logits_are_float32_without_gradient_in_any_precision(
    precision: str, tmp_path: Path
) -> None:
    spec = write_module(tmp_path, "nn.Sequential(nn.Flatten(), nn.Linear(64, 5))")
    logits = load(spec, precision=precision).logits(torch.rand(4, 1, 8, 8))
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_the_precision_is_that_of_the_teachers_arithmetic(tmp_path: Path) -> None:
    spec = write_module(tmp_path, "nn.Sequential(nn.Flatten(), nn.Linear(64, 5))")
    inputs = torch.rand(4, 1, 8, 8)
    teacher = load(spec, precision="bf16")
    logits = teacher.logits(inputs)
    assert torch.equal(logits, logits.bfloat16().float())
    exact = Teacher(teacher.spec, teacher.model, 5, CPU, "fp32", {}).logits(inputs)
    assert not torch.equal(exact, exact.bfloat16().float())


def test_provenance_says_whose_the_logits_are_and_no_folder(tmp_path: Path) -> None:
    weights = save_mlp(tmp_path / "teacher.safetensors")
    provenance = load("mlp:16", weights).provenance
    assert provenance["name"] == "mlp:16"
    assert provenance["weights"] == "teacher.safetensors"
    assert provenance["parameters"] == 64 * 16 + 16 + 16 * 5 + 5
    assert str(tmp_path) not in str(provenance)
    assert load(write_teacher(tmp_path)).provenance["name"] == "models.py:teacher"


def test_the_hash_is_of_the_weights_and_not_of_their_file(tmp_path: Path) -> None:
    weights = save_mlp(tmp_path / "a.safetensors")
    checkpoint = tmp_path / "b.pt"
    torch.save(mlp_state(seed=0), checkpoint)
    first, second = load("mlp:16", weights).provenance, load("mlp:16", checkpoint).provenance
    assert first["sha256"] == second["sha256"]
    assert (first["weights"], second["weights"]) == ("a.safetensors", "b.pt")


def mlp_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return mlp((1, 8, 8), (16,), 5).state_dict()


def test_the_hash_changes_with_a_single_weight(tmp_path: Path) -> None:
    state = mlp_state(seed=0)
    save_file(state, tmp_path / "a.safetensors")
    state["3.bias"][4] += 1e-6
    save_file(state, tmp_path / "b.safetensors")
    shas = [load("mlp:16", tmp_path / f"{name}.safetensors").provenance["sha256"] for name in "ab"]
    assert shas[0] != shas[1]


def test_the_hash_sees_buffers_types_shapes_and_names() -> None:
    class Holder(torch.nn.Module):
        def __init__(self, **buffers: Tensor) -> None:
            super().__init__()
            for name, buffer in buffers.items():
                self.register_buffer(name, buffer)

    ones = torch.ones(2, 3)
    models = [
        Holder(a=ones),
        Holder(a=ones + 1),
        Holder(b=ones),
        Holder(a=ones.reshape(3, 2)),
        Holder(a=ones.view(torch.int32)),
    ]
    assert len({state_sha256(model) for model in models}) == len(models)
    assert state_sha256(Holder(a=ones)) == state_sha256(Holder(a=ones.clone()))
    # 0-d tensors are hashed too, and the memory layout does not matter
    assert state_sha256(Holder(a=torch.tensor(1.0))) != state_sha256(Holder(a=torch.tensor(2.0)))
    assert state_sha256(Holder(a=ones.T.contiguous().T)) == state_sha256(Holder(a=ones))

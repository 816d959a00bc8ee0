"""Normalization in a model's specification: ?normalize=imagenet, ?mean=…&std=…."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from softcache.errors import ModelError, SettingsError
from softcache.models.build import build
from softcache.models.normalize import Normalized, normalized
from softcache.models.spec import parse_model
from softcache.models.weights import load_weights, state_sha256
from softcache.teachers.load import load_teacher
from softcache.teachers.spec import parse_teacher
from softcache.teachers.teacher import Teacher
from softcache.train.run_folder import Run

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

CODE = """
from torch import nn

class Model(nn.Module):
    class_names = ("red", "green", "blue")

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(nn.init.constant_(nn.Parameter(__import__("torch").empty(1)), 2.0))

    def forward(self, x):
        return self.scale * x.mean((2, 3))

def model():
    return Model()

def function():
    return lambda x: x.mean((2, 3))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "m.py").write_text(CODE)
    return tmp_path / "m.py"


def load(spec: str, weights: Path | None = None) -> Teacher:
    sample = torch.rand(1, 3, 4, 4)
    return load_teacher(
        spec, weights, sample=sample, classes=3, device=torch.device("cpu"), precision="fp32"
    )


def test_images_are_normalized_before_a_users_model(code: Path) -> None:
    model = build(f"{code}:model?normalize=imagenet", input_shape=(3, 4, 4), classes=3)
    images = torch.rand(5, 3, 4, 4)
    expected = 2 * (images.mean((2, 3)) - MEAN) / STD
    torch.testing.assert_close(model(images), expected)
    assert model.class_names == ("red", "green", "blue")


@pytest.mark.parametrize("name", ["model", "function"])
def test_a_teachers_images_are_too(name: str, code: Path) -> None:
    images = torch.rand(5, 3, 4, 4)
    scale = 2 if name == "model" else 1
    teacher = load(f"{code}:{name}?mean=0.5,0.25,0&std=0.2,0.5,1")
    expected = (
        scale * (images.mean((2, 3)) - torch.tensor([0.5, 0.25, 0])) / torch.tensor([0.2, 0.5, 1])
    )
    torch.testing.assert_close(teacher.logits(images), expected)
    assert teacher.class_names == (("red", "green", "blue") if name == "model" else ())
    assert teacher.provenance["name"] == f"m.py:{name}?mean=0.5,0.25,0&std=0.2,0.5,1"


def test_weights_keep_the_models_own_names(tmp_path: Path) -> None:
    plain = build("cnn:4", input_shape=(3, 8, 8), classes=3).eval()
    wrapped = build("cnn:4?normalize=imagenet", input_shape=(3, 8, 8), classes=3).eval()
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    torch.save(plain.state_dict(), tmp_path / "w.pt")
    load_weights(wrapped, tmp_path / "w.pt")
    assert state_sha256(wrapped) == state_sha256(plain)
    images = torch.rand(4, 3, 8, 8)
    same = (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    for model in (wrapped, copy.deepcopy(wrapped)):
        torch.testing.assert_close(model(images), plain(same))
    teacher = load("cnn:4?normalize=imagenet", tmp_path / "w.pt")
    torch.testing.assert_close(teacher.logits(images), plain(same))


def test_one_mean_serves_all_channels_and_tables() -> None:
    for shape in ((3, 4, 4), (6,)):
        model = build("mlp:5?mean=0.5&std=0.25", input_shape=shape, classes=2)
        inputs = torch.rand(4, *shape)
        assert isinstance(model, Normalized)
        torch.testing.assert_close(model(inputs), model.model((inputs - 0.5) / 0.25))


def test_without_options_the_model_is_itself(code: Path) -> None:
    model = nn.Linear(2, 2)
    assert normalized(model, parse_model(f"{code}:model"), (2,)) is model


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/srv/m.py:make?normalize=imagenet", "m.py:make?normalize=imagenet"),
        ("/srv/m.py:make?std=0.2&mean=0.5", "m.py:make?mean=0.5&std=0.2"),
        ("pkg.models:make?normalize=imagenet", "pkg.models:make?normalize=imagenet"),
        ("cnn:4?normalize=imagenet", "cnn:4?normalize=imagenet"),
        ("/srv/t.pt2?normalize=imagenet", "t.pt2?normalize=imagenet"),
        ("/srv/t.onnx?normalize=imagenet", "t.onnx?normalize=imagenet"),
        ("/srv/m.py:make", "m.py:make"),
    ],
)
def test_the_public_name_has_the_options(spec: str, name: str) -> None:
    assert parse_teacher(spec).public_name == name


def test_a_run_finds_the_code_of_its_student_by_the_name_with_options(
    code: Path, tmp_path: Path
) -> None:
    spec = f"{code}:model?normalize=imagenet"
    student = build(spec, input_shape=(3, 4, 4), classes=3)
    facts = {"settings": {"student": "m.py:model?normalize=imagenet"}, "input_shape": [3, 4, 4]}
    run = Run(tmp_path, {**facts, "classes": 3}, [])
    save_file(student.state_dict(), run.weights)
    images = torch.rand(5, 3, 4, 4)
    torch.testing.assert_close(run.model([f"{code}:model", spec])(images), student(images))
    with pytest.raises(SettingsError, match=r"its student m\.py:model\?normalize=imagenet is code"):
        run.model([f"{code}:model"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("m.py:f?normalize=mnist", r"normalize=mnist; expected normalize=imagenet alone, or mean= and std="),
        ("m.py:f?normalize=imagenet&mean=1", r"normalize=imagenet; expected .* alone"),
        ("cnn:4?mean=0.5", r"'cnn:4\?mean=0\.5' has one of mean= and std=; expected both"),
        ("cnn:4?mean=0.5,0.5&std=1", r"has 2 means and 1 standard deviations; expected a pair for"),
        ("cnn:4?mean=0.5&std=0", r"std=0; expected numbers above 0"),
        ("cnn:4?mean=a,b&std=1,1", r"mean=a,b; expected a number for each channel, as in mean=0\.5,0"),
        ("cnn:4?mean=nan&std=1", r"mean=nan; expected a number for each channel"),
        ("m.py:f?normalise=imagenet", r"unknown option 'normalise'; expected normalize, mean, std"),
        ("timm:resnet18?normalize=imagenet", r"timm: models normalize their inputs .*; leave normalize"),
        ("hf:vit?mean=0.5&std=0.5", r"hf: models normalize their inputs themselves, .*; leave mean out"),
        ("rows.npy?normalize=imagenet", r"a matrix of outputs takes no options but classes=A,B,C, since"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(spec: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_teacher(spec)


def test_channels_that_the_inputs_do_not_have_are_named(code: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"normalizes 3 channels, but its inputs have shape \(1, 8, 8\); expected 3",
    ):
        build("cnn:4?normalize=imagenet", input_shape=(1, 8, 8), classes=3)


def test_texts_cannot_be_normalized() -> None:
    model = build("mlp:4?mean=0&std=1", input_shape=(5,), classes=2)
    with pytest.raises(ValueError, match=r"of torch\.int64 cannot be normalized; expected floats"):
        model(torch.ones(2, 5, dtype=torch.int64))

"""Models from specifications, and weights from files of tensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models.build import build
from softcache.models.spec import parse_model
from softcache.models.weights import file_sha256, load_weights, parameter_count, read_weights

State = dict[str, Tensor]


def conv_bn(channels: int, width: int, kernel: int = 3) -> int:
    """Number of parameters of a convolution without bias and the batch norm after it."""
    return channels * width * kernel**2 + 2 * width


def linear(inputs: int, outputs: int) -> int:
    """Number of parameters of a linear layer."""
    return inputs * outputs + outputs


# specifications


@pytest.mark.parametrize(
    ("spec", "input_shape", "classes", "parameters"),
    [
        ("mlp:800,800", (1, 28, 28), 10, linear(784, 800) + linear(800, 800) + linear(800, 10)),
        ("mlp:7", (12,), 3, linear(12, 7) + linear(7, 3)),
        ("cnn:4", (3, 9, 9), 5, conv_bn(3, 4) + linear(4, 5)),
        (
            "cnn:32x2,64x2",
            (1, 28, 28),
            10,
            conv_bn(1, 32) + conv_bn(32, 32) + conv_bn(32, 64) + conv_bn(64, 64) + linear(64, 10),
        ),
        # the commonly quoted count for the CIFAR ResNet-20 with 1x1 convolutions as shortcuts
        ("resnet:20,16", (3, 32, 32), 10, 272_474),
        (
            "resnet:8,4",
            (1, 8, 8),
            2,
            conv_bn(1, 4)
            + 2 * conv_bn(4, 4)
            + (conv_bn(4, 8) + conv_bn(8, 8) + conv_bn(4, 8, kernel=1))
            + (conv_bn(8, 16) + conv_bn(16, 16) + conv_bn(8, 16, kernel=1))
            + linear(16, 2),
        ),
    ],
)
def test_a_built_in_model_has_the_parameters_its_sizes_say(
    spec: str, input_shape: tuple[int, ...], classes: int, parameters: int
) -> None:
    model = build(spec, input_shape=input_shape, classes=classes).eval()
    assert parameter_count(model) == parameters
    assert model(torch.rand(3, *input_shape)).shape == (3, classes)


@pytest.mark.parametrize("spec", ["mlp:5", "cnn:4x2,8", "resnet:8,4"])
def test_a_built_in_model_gives_each_sample_its_own_logits(spec: str) -> None:
    model = build(spec, input_shape=(2, 8, 8), classes=3).eval()
    images = torch.rand(6, 2, 8, 8)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-4, atol=1e-5)
    assert (alone[0] != alone[1]).any()


def test_the_last_convolution_of_each_stage_halves_the_image() -> None:
    model = build("cnn:4x2,8,8", input_shape=(1, 16, 16), classes=2)
    strides = [m.stride for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert strides == [(1, 1), (2, 2), (2, 2), (2, 2)]


def test_the_generator_decides_a_new_models_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(build("mlp:5", input_shape=(4,), classes=2).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("spec", ["resnet50", "", "model.py", "mlp800"])
def test_what_has_no_form_is_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"model '{spec}' is not a model spec.*expected mlp:SIZES, cnn"
    ):
        build(spec, input_shape=(1, 8, 8), classes=3)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *(
            (f"mlp:{sizes}", "sizes of at least 1, as in mlp:800,800")
            for sizes in ("", "0", "3,", "3x2", "-3")
        ),
        *((f"cnn:{widths}", "widths, as in cnn:16,32") for widths in ("", "0", "8x0", "8x", "8,,8", "x2")),
        ("resnet:16", "a depth of 6n"),
        ("resnet:21,16", "a depth of 6n"),
        ("resnet:2,16", "a depth of 6n"),
        ("resnet:20,16,3", "a depth of 6n"),
        ("resnet:20,0", "sizes of at least 1"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_named_with_an_example(spec: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=rf"model '{spec}': expected .*{expected}"):
        build(spec, input_shape=(1, 8, 8), classes=3)


def test_wrong_sizes_of_a_resnet_are_explained_by_a_resnet() -> None:
    with pytest.raises(
        SettingsError, match=r"'resnet:20,x': expected sizes .*, as in resnet:20,16"
    ):
        build("resnet:20,x", input_shape=(1, 8, 8), classes=3)


@pytest.mark.parametrize("spec", ["cnn:4", "resnet:8,4"])
def test_convolutions_want_images(spec: str) -> None:
    with pytest.raises(ModelError, match=rf"model {spec}: inputs of shape \(64,\) are not images"):
        build(spec, input_shape=(64,), classes=3)


USER_MODELS = """
from torch import nn

def make():
    return nn.Linear(3, 2)

def number():
    return 3

def failing():
    raise FileNotFoundError("backbone.ckpt")

def wants_more(classes):
    return nn.Linear(3, classes)
"""


@pytest.fixture
def user_models(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(USER_MODELS)
    return path


def test_a_callable_of_a_file_or_a_module_makes_the_model(user_models: Path) -> None:
    model = build(f"{user_models}:make", input_shape=(3,), classes=2)
    assert isinstance(model, nn.Linear)
    assert parameter_count(model) == 8
    assert isinstance(build("torch.nn:Identity", input_shape=(3,), classes=2), nn.Identity)


def test_what_is_no_model_is_refused(user_models: Path) -> None:
    with pytest.raises(
        ModelError, match=r"models\.py:number returned int; expected a torch nn\.Mod"
    ):
        build(f"{user_models}:number", input_shape=(3,), classes=2)


@pytest.mark.parametrize(
    ("name", "cause"),
    [("failing", r"FileNotFoundError: backbone\.ckpt"), ("wants_more", "TypeError.*'classes'")],
)
def test_a_callable_that_raises_is_named(user_models: Path, name: str, cause: str) -> None:
    with pytest.raises(SettingsError, match=rf"model .*models\.py:{name}: .* {cause}"):
        build(f"{user_models}:{name}", input_shape=(3,), classes=2)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("/srv/me/models.py:teacher", "models.py:teacher"),
        ("models.py:teacher", "models.py:teacher"),
        ("package.module:teacher", "package.module:teacher"),
        ("/srv/me/teacher.pt2", "teacher.pt2"),
        ("mlp:800,800", "mlp:800,800"),
    ],
)
def test_no_folder_of_a_specification_goes_into_a_shared_file(spec: str, name: str) -> None:
    assert parse_model(spec).public_name == name


# exported programs


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An exported program for batches of any size, and the model it was made from."""
    path = tmp_path_factory.mktemp("exported") / "teacher.pt2"
    torch.manual_seed(0)
    model = build("mlp:5", input_shape=(1, 2, 2), classes=3).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.rand(2, 1, 2, 2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path, model


def test_an_exported_program_gives_what_its_model_gave(exported: tuple[Path, nn.Module]) -> None:
    path, model = exported
    loaded = build(str(path), input_shape=(1, 2, 2), classes=3)
    images = torch.rand(7, 1, 2, 2)
    torch.testing.assert_close(loaded(images), model(images))
    assert parameter_count(loaded) == parameter_count(model)
    for training in (True, False):  # torch's own module refuses both, since its mode is fixed
        assert loaded.train(training).training is training


def test_a_cut_exported_program_is_named(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(exported[0].read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model .*cut\.pt2 is not an exported program: \S"):
        build(str(path), input_shape=(1, 2, 2), classes=3)


@pytest.mark.parametrize("raw", [b"", b"hello"])
def test_what_is_no_exported_program_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.pt2").write_bytes(raw)
    with pytest.raises(ModelError, match=r"model .*a\.pt2 is not an exported program: \S"):
        build(str(tmp_path / "a.pt2"), input_shape=(1, 2, 2), classes=3)


def test_a_missing_exported_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model .*gone\.pt2: no such file"):
        build(str(tmp_path / "gone.pt2"), input_shape=(1, 2, 2), classes=3)


# weights


@pytest.fixture
def model() -> nn.Module:
    """A model with every kind of tensor: parameters, float buffers and an integer buffer."""
    return build("cnn:4", input_shape=(1, 8, 8), classes=3)


def other_state(model: nn.Module) -> State:
    """Tensors of the same names, dtypes and shapes as the model's, with other values."""
    return {
        name: torch.full_like(value, n + 1)
        for n, (name, value) in enumerate(model.state_dict().items())
    }


def with_prefix(state: State) -> State:
    return {f"module.{name}": value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": dict,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best": 0.9},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "both": lambda state: {"state_dict": {"model": state}},
    "module.": with_prefix,
    "nested module.": lambda state: {"state_dict": with_prefix(state)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt"])
def test_a_checkpoint_may_nest_and_prefix_its_tensors(
    model: nn.Module, tmp_path: Path, layout: str, suffix: str
) -> None:
    state, path = other_state(model), tmp_path / f"weights.{suffix}"
    torch.save(LAYOUTS[layout](state), path)
    load_weights(model, path)
    assert_state(model, state)


def assert_state(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_checkpoints_of_older_torch_are_read(model: nn.Module, tmp_path: Path) -> None:
    state, path = other_state(model), tmp_path / "old.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    load_weights(model, path)
    assert_state(model, state)


def test_safetensors_are_read(model: nn.Module, tmp_path: Path) -> None:
    state, path = other_state(model), tmp_path / "weights.safetensors"
    save_file(state, path)
    load_weights(model, path)
    assert_state(model, state)


def test_safetensors_may_have_a_prefix_too(model: nn.Module, tmp_path: Path) -> None:
    state, path = other_state(model), tmp_path / "weights.safetensors"
    save_file(with_prefix(state), path)
    load_weights(model, path)
    assert_state(model, state)


MISFITS: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda state: state.pop("head.bias"), r"head\.bias is missing;"),
    "unexpected": (
        lambda state: state.update({"head.scale": torch.ones(3)}),
        r"head\.scale is not in the model;",
    ),
    "shape": (
        lambda state: state.update({"head.weight": torch.ones(5, 4)}),
        r"head\.weight is \(5, 4\) in the file, \(3, 4\) in the model;",
    ),
    "all three": (
        lambda state: state.update({"neck": state.pop("head.bias"), "head.weight": torch.ones(3)}),
        r"head\.bias is missing; neck is not in the model; head\.weight is \(3,\) in the file",
    ),
    "all": (
        lambda state: state.clear(),
        r"features\.0\.0\.weight is missing; .* and 2 more; the file has no tensors;",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_that_do_not_fit_are_named_and_change_nothing(
    model: nn.Module,
    tmp_path: Path,
    spoil: Callable[[State], object],
    message: str,
    suffix: str,
) -> None:
    path, state = tmp_path / f"weights.{suffix}", other_state(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoil(state)
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    with pytest.raises(ModelError, match=rf"weights .*{path.name} do not fit the model: {message}"):
        load_weights(model, path)
    assert_state(model, before)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_missing_weights_are_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ModelError, match=rf"weights .*gone\.{suffix}: no such file"):
        read_weights(tmp_path / f"gone.{suffix}")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("raw", [b"", b"hello" * 100, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_weights_is_named(tmp_path: Path, raw: bytes, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(raw)
    with pytest.raises(
        ModelError, match=rf"weights .*weights\.{suffix} (cannot be read|hold more)"
    ):
        read_weights(path)


def test_a_cut_file_is_named(model: nn.Module, tmp_path: Path) -> None:
    for path, save in ((tmp_path / "a.safetensors", save_file), (tmp_path / "a.pt", torch.save)):
        save(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(ModelError, match=rf"weights .*{path.name} cannot be read: \w"):
            read_weights(path)


def test_the_reason_why_a_file_cannot_be_read_is_words(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"hello" * 100)
    with pytest.raises(ModelError, match=r"cannot be read: .*[a-z]{3}"):
        read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1, 2], 3, {"a": 1}, {"state_dict": {"a": "b"}}])
def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt are not a state dict; expected tensors by name"):
        read_weights(tmp_path / "a.pt")


def test_a_whole_pickled_model_is_refused_with_what_to_do(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(
        ModelError, match=r"a\.pt hold more than tensors.*save model\.state_dict\(\)"
    ):
        read_weights(tmp_path / "a.pt")


def test_the_refusal_gives_no_advice_to_load_it_anyway(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"^(?!.*(can still be loaded|\x1b)).*more than tensors"):
        read_weights(tmp_path / "a.pt")


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def save_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_old(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [save_zip, save_old, save_pickle])
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(
    tmp_path: Path, save: Callable[[object, Path], None], nested: bool
) -> None:
    path, done = tmp_path / "weights.pt", tmp_path / "done"
    save({"state_dict": {"w": Payload(done)}} if nested else Payload(done), path)
    with pytest.raises(
        ModelError, match=r"weights\.pt hold more than tensors, which softcache never load"
    ):
        read_weights(path)
    assert not done.exists()


def test_the_payload_would_do_harm_if_it_were_run(tmp_path: Path) -> None:
    path, done = tmp_path / "weights.pt", tmp_path / "done"
    save_zip({"w": Payload(done)}, path)
    torch.load(path, weights_only=False)
    assert done.exists()


def test_a_pickle_named_safetensors_is_not_unpickled(tmp_path: Path) -> None:
    path, done = tmp_path / "weights.safetensors", tmp_path / "done"
    save_zip({"w": Payload(done)}, path)
    with pytest.raises(ModelError, match=r"weights\.safetensors cannot be read: "):
        read_weights(path)
    assert not done.exists()


def test_a_files_sha256_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the example in FIPS 180-2
    assert file_sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )

"""Weights files as people save them: nested, prefixed, with other things beside the tensors."""

from __future__ import annotations

import argparse
import datetime
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from softcache.errors import ModelError
from softcache.models.build import build
from softcache.models.checkpoint import read_checkpoint, state_dicts
from softcache.models.weights import load_weights, read_weights

State = dict[str, Tensor]


def make_model(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def state() -> State:
    """Trained weights: every tensor differs from those of a new model."""
    return {n: t + (3 if t.ndim == 0 else 0.5) for n, t in make_model(0).state_dict().items()}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(place: str, prefix: str = "", **beside: object) -> Callable[[State], dict[str, Any]]:
    return lambda state: {place: prefixed(prefix)(state), **beside}


def averaged(state: State) -> State:
    model = make_model()
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


def adam(state: State) -> dict[str, Any]:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 6)).sum().backward()
    optimizer.step()
    return {"model": state, "optimizer": optimizer.state_dict()}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": dict,
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "a prefix of its own": prefixed("backbone."),
    "three prefixes": prefixed("model.module._orig_mod."),
    "ImageNet": inside("state_dict", "module.", epoch=7, best_acc1=torch.tensor(71.0)),
    "net": inside("net", acc=94.1, epoch=3),
    "model_state_dict": inside("model_state_dict", optimizer_state_dict={}, epoch=3),
    "Lightning": inside("state_dict", "model.", hyper_parameters={"lr": 0.1}, callbacks={}),
    "epoch beside": lambda state: {**state, "epoch": 3},
    "three levels": lambda state: {"ema": {"weights": {"net": state}}},
    "Namespace": inside("model", args=argparse.Namespace(lr=0.1, out=Path("x"))),
    "numpy": inside("state_dict", best=np.float64(71.2), matrix=np.eye(3), kind=np.dtype("f4")),
    "times": inside("state_dict", at=datetime.datetime(2024, 1, 1), took=datetime.timedelta(1)),
    "defaultdict": inside("net", history=defaultdict(list, {"loss": [1.0]})),
    "AveragedModel": averaged,
    "optimizer": adam,
    "thop": lambda state: {
        **state, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)
    },
    "half of it wrapped": lambda state: {n.replace("1.", "1.module."): t for n, t in state.items()},
    "equal copies": lambda state: {"model": state, "ema": {n: t.clone() for n, t in state.items()}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_mapping_that_fits_is_found(
    layout: Callable[[State], dict[str, Any]], state: State, tmp_path: Path
) -> None:
    torch.save(layout(state), tmp_path / "w.pt")
    model = make_model()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, state)


def assert_loaded(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_prefixes_in_safetensors_too(state: State, tmp_path: Path) -> None:
    save_file(prefixed("module._orig_mod.")(state), tmp_path / "w.safetensors")
    model = make_model()
    load_weights(model, tmp_path / "w.safetensors")
    assert_loaded(model, state)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_the_model_may_be_wrapped_where_the_file_is_not(
    wrap: Callable[[nn.Module], nn.Module], state: State, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "w.pt")
    model = make_model()
    load_weights(wrap(model), tmp_path / "w.pt")
    assert_loaded(model, state)


def test_a_prefix_that_the_model_has_itself_is_kept(state: State, tmp_path: Path) -> None:
    outer = nn.ModuleDict({"model": make_model()})
    torch.save({"state_dict": prefixed("model.")(state)}, tmp_path / "w.pt")
    load_weights(outer, tmp_path / "w.pt")
    assert_loaded(outer["model"], state)


def test_a_class_of_dictionaries_that_is_not_installed(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("yacs.config")
    kind = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = kind  # type: ignore[attr-defined]
    config = kind({"size": 3, "inner": kind({"a": 1})})
    config.frozen = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save({"model": state, "config": config}, tmp_path / "w.pt")
    model = make_model()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, state)
    read = read_checkpoint(tmp_path / "w.pt")
    assert isinstance(read, dict)
    assert dict(read["config"])["size"] == 3


def test_classes_beside_the_weights_are_read_as_nothing(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "args": argparse.Namespace(a=1)}, tmp_path / "w.pt")
    read = read_checkpoint(tmp_path / "w.pt")
    assert isinstance(read, dict)
    assert not isinstance(read["args"], argparse.Namespace)
    assert not hasattr(read["args"], "a")
    # without the list of stand-ins, torch refuses the file
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "w.pt", weights_only=True)


@pytest.mark.parametrize("counter", ["without", "overflown"])
def test_counters_of_batch_norm_may_be_missing_or_too_large(
    counter: str, state: State, tmp_path: Path
) -> None:
    saved = {n: t for n, t in state.items() if "num_batches" not in n}
    if counter == "overflown":
        saved["1.num_batches_tracked"] = torch.tensor(450_000).half()
    torch.save(saved, tmp_path / "w.pt")
    model = make_model()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, state | {"1.num_batches_tracked": torch.tensor(0)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float16])
def test_floats_are_converted_to_the_models(
    dtype: torch.dtype, own: torch.dtype, state: State, tmp_path: Path
) -> None:
    torch.save({n: t.to(dtype) for n, t in state.items()}, tmp_path / "w.pt")
    model = make_model().to(own)
    load_weights(model, tmp_path / "w.pt")
    assert all(p.dtype == own for p in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.float(), state[name].float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("layout", ["plain", "thop"])
def test_a_built_in_model_takes_its_own_layouts(layout: str, tmp_path: Path) -> None:
    model = build("cnn:4", input_shape=(1, 8, 8), classes=3)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, state)


def test_what_is_left_out_is_said(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": prefixed("model.")(state) | beside}, tmp_path / "w.pt")
    model = make_model()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, state)
    out = capsys.readouterr().out
    assert "took the 9 tensors under state_dict.model and ignored the other 1" in out


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


REFUSED: dict[str, tuple[Callable[[State], object], str]] = {
    "two that fit": (
        lambda state: {"model": state, "model_ema": other(state)},
        r"hold 2 sets of tensors that fit the model: 'model', 'model_ema'; choose one with .*key=model_ema",
    ),
    "student and teacher": (
        lambda state: prefixed("student.")(state) | prefixed("teacher.")(other(state)),
        r"hold 2 sets of tensors that fit the model: 'student', 'teacher'; choose one with",
    ),
    "another model": (
        lambda state: {"state_dict": {f"layer{n}.weight": torch.ones(2) for n in range(9)}},
        r"do not fit the model: 0\.weight is missing; .*; the file has layer0\.weight, layer1\.weight, "
        r"layer2\.weight, layer3\.weight, layer4\.weight and 4 more in 'state_dict'; use the specification",
    ),
    "a part": (
        lambda state: {"model": {n: t for n, t in state.items() if n != "3.bias"}},
        r"do not fit the model: 3\.bias is missing; the file has 0\.weight, 0\.bias, .* in 'model'; use",
    ),
    "a shape under a prefix": (
        lambda state: prefixed("module.")(state) | {"module.3.bias": torch.ones(10)},
        r"do not fit the model: 3\.bias is \(10,\) in the file, \(3,\) in the model; the file has module\.",
    ),
    "integers": (
        lambda state: state | {"0.weight": torch.ones(8, 6, dtype=torch.int8)},
        r"do not fit the model: 0\.weight is int8 in the file, float32 in the model; ",
    ),
    "too deep": (
        lambda state: {"a": {"b": {"c": {"d": state}}}},
        r"are not a state dict; expected tensors by name",
    ),
    "a whole model": (
        lambda state: make_model(),
        r"hold more than tensors, .*\(torch\.nn\.modules\.container\.Sequential\); save model\.state_dict",
    ),
    "another class": (
        lambda state: {"state_dict": state, "activation": nn.ReLU()},
        r"hold more than tensors, .*\(torch\.nn\.modules\.activation\.ReLU\); save model\.state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(
    content: Callable[[State], object], message: str, state: State, tmp_path: Path
) -> None:
    torch.save(content(state), tmp_path / "w.pt")
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"^weights .*w\.pt {message}") as raised:
        load_weights(model, tmp_path / "w.pt")
    assert "\n" not in str(raised.value)
    assert_loaded(model, before)


@pytest.mark.parametrize("path_of", [lambda path: path, lambda path: path.with_name("w?key=x.pt")])
def test_one_of_several_sets_is_chosen_by_its_key(
    path_of: Callable[[Path], Path], state: State, tmp_path: Path
) -> None:
    path = path_of(tmp_path / "w.pt")
    raw, ema = state, other(state)
    torch.save({"model": raw, "ema": {"module": ema}, "student.x": 1}, path)
    for key, expected in (("model", raw), ("ema", ema), ("ema.module", ema)):
        chosen = path.with_name(f"{path.name}?key={key}")
        model = make_model()
        load_weights(model, chosen)
        assert_loaded(model, expected)
        assert torch.equal(read_weights(chosen)["0.weight"], expected["0.weight"])
    with pytest.raises(
        ModelError,
        match=r"no tensors under 'em' that fit the model; those under 'model', 'ema.module' do",
    ):
        load_weights(make_model(), path.with_name(f"{path.name}?key=em"))


def test_one_of_several_prefixes_is_chosen_by_its_key(state: State, tmp_path: Path) -> None:
    torch.save(prefixed("student.")(state) | prefixed("teacher.")(other(state)), tmp_path / "w.pt")
    model = make_model()
    load_weights(model, tmp_path / "w.pt?key=teacher")
    assert_loaded(model, other(state))


def test_the_largest_mapping_is_read_without_a_model(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state, "metrics": {"f1": torch.ones(3)}}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").keys() == state.keys()


def test_mappings_are_named_by_their_place() -> None:
    one = torch.ones(1)
    found = state_dicts({"best": one, "state_dict": {"w": one, "n": 3}, "opt": {"s": {0: one}}})
    assert {place: list(mapping) for place, mapping in found.items()} == {
        "": ["best"],
        "state_dict": ["w"],
    }

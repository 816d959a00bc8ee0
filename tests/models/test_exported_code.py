"""Programs in .pt2 files: those that are only data are loaded, those that may run code are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from softcache.errors import ModelError
from softcache.models.build import build
from softcache.models.exported_check import code_in
from tests.cli.app_cases import softcache

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(model, (torch.rand(2, 3, 8, 8),), dynamic_shapes=shapes)
    path = tmp_path_factory.mktemp("program") / "m.pt2"
    torch.export.save(exported, path)
    return path


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch attacked",)


def changed(program: Path, folder: Path, change: Callable[[Contents], None]) -> Path:
    with zipfile.ZipFile(program) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    path = folder / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in contents.items():
            archive.writestr(name, raw)
    return path


def in_json(end: str, change: Callable[[Any], None]) -> Callable[[Contents], None]:
    def apply(contents: Contents) -> None:
        name = next(name for name in contents if name.endswith(end))
        value = json.loads(contents[name])
        change(value)
        contents[name] = json.dumps(value).encode()

    return apply


def call(target: str) -> Callable[[Contents], None]:
    def change(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = target

    return in_json("model.json", change)


def expression(text: str) -> Callable[[Contents], None]:
    def change(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["sym_int_values"]["s0"] = {"as_expr": {"expr_str": text}}

    return in_json("model.json", change)


def pickled_weight(contents: Contents) -> None:
    in_json("weights_config.json", lambda c: c["config"]["0.weight"].update(use_pickle=True))(
        contents
    )
    contents["m/data/weights/weight_0"] = pickle.dumps(Attack())


def custom_object(contents: Contents) -> None:
    payload = {
        "path_name": "custom_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    in_json("constants_config.json", lambda c: c["config"].update(x=payload))(contents)
    contents["m/data/constants/custom_obj_0"] = pickle.dumps(Attack())


def sample_inputs(contents: Contents) -> None:
    raw = io.BytesIO()
    torch.save((Attack(),), raw)
    contents["m/data/sample_inputs/model.pt"] = raw.getvalue()


def library(contents: Contents) -> None:
    contents["m/extra/code.so"] = b"\x7fELF"


def compiled(contents: Contents) -> None:
    contents["m/data/weights/code.so"] = b"\x7fELF"


def hidden_graph(contents: Contents) -> None:
    """A graph under a name that torch reads too, since it cuts off five characters, whatever they are."""
    expression("__import__('os').system('touch attacked')")(contents)
    contents["m/models/model_json"] = contents.pop("m/models/model.json")
    contents["m/models/other.json"] = b"{}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (call("torch.hub.load_state_dict_from_url"), r"it calls 'torch\.hub\.load_state_dict_from_url'"),
        (call("torch.ops.aten.os.system.default"), r"it calls 'torch\.ops\.aten\.os\.system\.default'"),
        (call("_operator.call"), r"it calls '_operator\.call'"),
        (call("_operator.methodcaller"), "it calls"),
        (call("#Extension:x"), "it calls"),
        (call("os.system"), "it calls"),
        (expression("__import__('os').system('touch attacked')"), "it evaluates"),
        (expression("eval(chr(49))"), "it evaluates"),
        (expression("s0.free_symbols"), "it evaluates"),
        (pickled_weight, r"weight_0 is a pickle of more than tensors"),
        (custom_object, r"custom_obj_0 is an object of a class of its own"),
        (sample_inputs, r"sample_inputs/model\.pt is a pickle of more than tensors"),
        (library, r"extra/code\.so is no part of an exported program"),
        (hidden_graph, r"models/model_json is no part of an exported program"),
        (compiled, r"weights/code\.so is compiled code"),
    ],
)  # fmt: skip
def test_what_may_run_code_is_refused_and_not_run(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Contents], None], reason: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = changed(program, tmp_path, change)
    with pytest.raises(
        ModelError, match=rf"may run code of its own \(.*{reason}.*add --trust-code"
    ):
        build(str(path), input_shape=(3, 8, 8), classes=5)
    assert not (tmp_path / "attacked").exists()


def test_with_trust_it_is_loaded(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(program, tmp_path, library)
    with pytest.raises(ModelError, match="trust-code"):
        build(str(path), input_shape=(3, 8, 8), classes=5)
    build(str(path), input_shape=(3, 8, 8), classes=5, trust_code=True)


@pytest.mark.parametrize(
    "text", ["s0", "2*s31 + 1", "Max(1, s0//2)", "Mod(s0, 8)", "(s0 - 1)**2", "u0 >= 2"]
)
def test_sizes_are_expressions(program: Path, tmp_path: Path, text: str) -> None:
    assert code_in(changed(program, tmp_path, expression(text))) is None


def test_a_name_that_occurs_twice_is_refused(program: Path, tmp_path: Path) -> None:
    path = changed(program, tmp_path, lambda contents: None)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("m/models/model.json", "{}")
    with pytest.raises(ModelError, match="two of its parts have the same name"):
        build(str(path), input_shape=(3, 8, 8), classes=5)


def test_what_was_checked_is_what_is_loaded(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a file may look different to two readers of archives: torch gets a copy of what was checked
    loaded: list[object] = []
    load = torch.export.load

    def recorded(source: io.BytesIO) -> object:
        loaded.append(source)
        return load(source)

    monkeypatch.setattr(torch.export, "load", recorded)
    build(str(program), input_shape=(3, 8, 8), classes=5)
    (copy,) = loaded
    assert isinstance(copy, io.BytesIO)
    with zipfile.ZipFile(copy) as archive, zipfile.ZipFile(program) as original:
        assert archive.namelist() == original.namelist()
        assert all(archive.read(name) == original.read(name) for name in archive.namelist())


def test_programs_that_softcache_writes_need_no_trust(program: Path) -> None:
    assert code_in(program) is None
    model = build(str(program), input_shape=(3, 8, 8), classes=5).eval()
    assert model(torch.rand(7, 3, 8, 8)).shape == (7, 5)


def test_the_command_takes_it(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (30, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "d.npz", x=images)
    path = changed(program, tmp_path, library)
    arguments = ["dump", "--teacher", str(path), "--data", "npz:d.npz", "-o", "c.h5"]
    refused = softcache(*arguments)
    assert refused.exit_code == 1
    assert "add --trust-code" in refused.stderr
    assert softcache(*arguments, "--trust-code").exit_code == 0
    shutil.copy(program, path)
    assert softcache(*arguments, "--overwrite").exit_code == 0

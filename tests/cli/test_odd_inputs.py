"""Pipes in the place of files, numbers of any size, characters that mean something: one line, and soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from softcache.cache import Cache, open_cache
from softcache.data.open import open_source
from softcache.data.spec import parse_data
from softcache.dump.config import DumpConfig
from softcache.models.spec import parse_model
from softcache.teachers.spec import parse_teacher
from softcache.util.spec import escape, unescape
from tests.cli.app_cases import softcache

BIG, HUGE = "1" + "0" * 400, "1" + "0" * 5000


@pytest.fixture
def files(cache: Cache, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a cache, its data, and a pipe under many names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.npz").write_bytes(data_file.read_bytes())
    names = "p.h5 p.npz p.npy p.pt p.onnx p.pt2 p.csv p.parquet p.toml p.txt p.safetensors p.py"
    for name in names.split():
        os.mkfifo(tmp_path / name)
    (tmp_path / "idx").mkdir()
    os.mkfifo(tmp_path / "idx" / "train-images-idx3-ubyte")
    return tmp_path


TRAIN = ["train", "tiny.h5", "--data", "npz:data.npz", "-o", "run"]


@pytest.mark.parametrize(
    "arguments",
    [
        *([command, "p.h5"] for command in ("info", "verify", "repair", "compare", "report")),
        ["merge", "p.h5", "p.h5", "-o", "m.h5"], ["export-labels", "p.h5", "-o", "l.npy"],
        ["push", "p.h5", "there.h5"], ["train", "p.h5", "--student", "mlp:4", "-o", "run"],
        *(["import", f"p.{kind}", "--data", "npz:data.npz", "-o", "c.h5"] for kind in ("npy", "npz", "pt")),
        *(
            ["dump", "--teacher", f"p.{kind}", "--data", "npz:data.npz", "-o", "c.h5"]
            for kind in ("onnx", "pt2", "py:make")
        ),
        *(
            ["dump", "--teacher", "mlp:4", "--weights", "p.safetensors", "--data", data, "-o", "c.h5"]
            for data in ("npz:data.npz", "npz:p.npz", "csv:p.csv", "parquet:p.parquet", "idx:idx")
        ),
        [*TRAIN, "--config", "p.toml"], [*TRAIN, "--student", "mlp:4", "--class-weights", "p.txt"],
        [*TRAIN, "--student", "mlp:4", "--init", "p.pt"], [*TRAIN, "--student", "p.py:make"],
        ["verify", "idx"], ["import", "idx", "--data", "npz:data.npz", "-o", "c.h5"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_pipe_or_a_folder_is_no_file(files: Path, arguments: list[str]) -> None:
    result = softcache(*arguments)  # would wait for ever
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output + result.stderr
    assert len(result.stderr.strip().splitlines()) <= 4  # usage errors of click have some lines
    assert not (files / "c.h5").exists()


@pytest.mark.parametrize(
    "number", [BIG, HUGE, "99999999999999999999", "-99999999999999999999", "1e999", "nan"]
)
@pytest.mark.parametrize(
    "option",
    ["--epochs", "--batch-size", "--seed", "--micro-batches", "--lr", "--temperature", "--alpha"],
)  # fmt: skip
def test_numbers_of_any_size_are_refused_in_one_line(files: Path, option: str, number: str) -> None:
    result = softcache(*TRAIN, "--student", "mlp:4", option, number)
    assert result.exit_code in (1, 2), result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert len(result.stderr) < 2500 + len(number)
    assert not (files / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--student", f"mlp:{number}"] for number in (BIG, HUGE, "4,9999999999")),
        ["--student", "cnn:4x99999999"], ["--student", f"resnet:{BIG},4"],
        ["--student", "mlp:4", "--grid", f"seed={BIG}"], ["--student", "mlp:4", "--grid", f"lr={HUGE}"],
    ],
    ids=lambda arguments: arguments[-1][:20],
)  # fmt: skip
def test_numbers_in_specifications_too(files: Path, arguments: list[str]) -> None:
    result = softcache(*TRAIN, *arguments)
    assert result.exit_code in (1, 2), result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [f"epochs = {HUGE}", f"epochs = {BIG}", "lr = inf", "a = " + "[" * 3000, "epochs = 1.5", "\0"],
)
def test_numbers_in_toml_too(files: Path, text: str) -> None:
    (files / "c.toml").write_text(text)
    result = softcache(*TRAIN, "--student", "mlp:4", "--config", "c.toml")
    assert result.exit_code in (1, 2), result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "encoding", [f"topk:{HUGE}", f"sampled:{BIG}", f"basis:{HUGE},1", f"basis:1,{BIG}"]
)
def test_numbers_in_encodings_too(files: Path, encoding: str, dump_config: DumpConfig) -> None:
    result = softcache(
        "dump",
        "--teacher",
        str(dump_config.teacher),
        "--data",
        "npz:data.npz",
        "--encoding",
        encoding,
        "-o",
        "c.h5",
    )
    assert result.exit_code in (1, 2), result.output
    assert len(result.stderr.strip().splitlines()) == 1


# characters that end a place


NAMES = ["a?b", "a@b", "a#b", "a%3Fb", "a::b", "50%", "a b", "é?@%25"]


@pytest.mark.parametrize("name", NAMES)
def test_a_place_is_escaped_and_comes_back(name: str) -> None:
    assert unescape(escape(name)) == name
    assert parse_data(f"folder:{escape(name)}@test").place == name
    assert parse_data(f"folder:{escape(name)}?size=8@test").split == "test"
    assert parse_model(f"{escape(name)}.py:make").place == f"{name}.py"
    assert parse_model(f"{escape(name)}.pt2?normalize=imagenet").place == f"{name}.pt2"
    assert parse_teacher(f"{escape(name)}.npy?classes=a,b").place == f"{name}.npy"
    for text in (f"npz:{escape(name)}.npz", f"{escape(name).replace(':', '%3A')}.py:make"):
        public = parse_data(text).public_name
        assert parse_data(public).place == parse_data(text).place


def test_an_at_in_the_name_of_a_folder_is_no_split() -> None:
    spec = parse_data("folder:/data/me@host/images")
    assert (spec.place, spec.split) == ("/data/me@host/images", "")
    assert parse_data("folder:/data/me@host/images@val").split == "val"


@pytest.mark.parametrize("name", NAMES)
def test_files_of_any_name_are_dumped_and_pushed(
    dump_config: DumpConfig,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.npz").write_bytes(data_file.read_bytes())
    data = f"npz:{escape(name)}.npz"
    assert len(open_source(data)) == 300
    out = f"{name}.h5"
    result = softcache("dump", "--teacher", str(dump_config.teacher), "--data", data, "-o", out)
    assert result.exit_code == 0, result.stderr
    pushed, pulled = f"{name}-2.h5", f"{name}-3.h5"
    for arguments in (
        ["verify", out],
        ["info", out],
        ["push", out, pushed],
        ["pull", out, "-o", pulled],
    ):
        result = softcache(*arguments)
        assert result.exit_code == 0, (arguments, result.stderr)
    assert open_cache(pushed).content_id() == open_cache(pulled).content_id()

"""The command lines of the demo. What they do is tested with the commands themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from softcache.cli.app import main
from softcache.cli.demo_commands import demo_commands
from softcache.errors import SettingsError
from softcache.models.build import build
from softcache.models.weights import parameter_count
from softcache.train.config import TrainConfig
from softcache.train.grid import make_variants
from softcache.train.options import make_train_config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a file that only has the name of the teacher's weights."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "teacher.safetensors").write_bytes(b"no weights")
    return folder


def parse(arguments: list[str]) -> click.Context:
    """Parse a command line without running it."""
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None
    return command.make_context(arguments[0], arguments[1:])


def test_the_command_lines_are_those_of_the_whole_job(data: Path, tmp_path: Path) -> None:
    commands = demo_commands(data, tmp_path / "runs", seed=3)
    dump, info, train, few = (parse(command).params for command in commands)
    assert [command[0] for command in commands] == ["dump", "info", "train", "train"]
    assert dump["out"] == Path(info["cache"]) == tmp_path / "runs" / "mnist.h5"
    assert train["cache"] == (str(dump["out"]),)
    assert (dump["data"],) == train["data"] == (f"idx:{data}/mnist",)
    assert dump["eval_data"] == train["eval_data"] == f"idx:{data}/mnist@test"
    assert train["seed"] == 3
    assert train["baseline"]
    assert not few["cache"]
    assert few["student"] == train["student"]
    assert train_config(train).names() == [""]
    assert few["data"] == (f"idx:{data}/mnist?shuffle=0&samples=600",)
    assert few["eval_data"] == train["eval_data"]
    config = train_config(few)
    assert config.soft_weight(config.students[0]) == 0


def train_config(options: dict[str, Any]) -> TrainConfig:
    """The configuration, as the command makes it from its options."""
    variants = make_variants(*(options.pop(name) for name in ("student", "grid", "tables")))
    return make_train_config(students=variants, **options)


def test_a_command_line_that_does_not_parse_would_be_noticed() -> None:
    with pytest.raises(click.NoSuchOption, match=r"No such option.*--teach"):
        parse(["info", "cache.h5", "--teach"])


def test_each_seed_has_its_own_folder(data: Path, tmp_path: Path) -> None:
    folders = {parse(demo_commands(data, tmp_path, seed)[2]).params["out"] for seed in range(3)}
    assert len(folders) == 3


def test_the_student_has_a_tenth_of_the_teachers_parameters(data: Path, tmp_path: Path) -> None:
    dump, _, train, _ = (parse(command).params for command in demo_commands(data, tmp_path, 0))
    teacher = dump["teacher"] if isinstance(dump["teacher"], str) else dump["teacher"][0]
    sizes = [
        parameter_count(build(spec, input_shape=(1, 28, 28), classes=10))
        for spec in (teacher, *train["student"])
    ]
    assert 10 * sizes[1] <= sizes[0]


def test_a_folder_without_the_teacher_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r".*teacher\.safetensors does not exist; run the demo in a clone of .*, or .*--data-dir",
    ):
        demo_commands(tmp_path, tmp_path, seed=0)


def test_folders_may_have_spaces_in_their_names(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "my runs"
    for command in demo_commands(data, out, seed=0):
        parse(command)


def demo(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def test_the_command_tells_what_is_missing_in_one_line(tmp_path: Path) -> None:
    result = demo("--data-dir", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"Error: {tmp_path}/teacher.safetensors does not exist; run the demo in a clone of the project, "
        "or name its data folder with --data-dir\n"
    )


def test_the_demo_stops_at_the_first_command_that_fails(data: Path, tmp_path: Path) -> None:
    result = demo("--data-dir", data, "--out", tmp_path / "runs")
    assert result.exit_code == 1
    assert [line.split()[2] for line in result.stdout.splitlines() if line] == ["dump"]
    assert result.stderr == (
        "Error: no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz in "
        f"{data}/mnist; expected the IDX files of MNIST\n"
    )

"""The command line: help, defaults, output, and that slow imports happen only where they are needed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import click
from click.testing import CliRunner

from softcache import __version__
from softcache.cache import Cache
from softcache.cli.app import main
from softcache.cli.commands import Command
from softcache.dump.config import DumpConfig
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.grid import make_variants
from softcache.train.options import make_train_config
from tests.cli.app_cases import Workspace, softcache
from tests.conftest import Run

COMMANDS = (
    "dump", "train", "info", "verify", "merge", "repair", "demo", "pull", "push", "import",
    "export-labels", "compare", "report", "export", "help",
)  # fmt: skip


# help and options
def test_every_command_has_help() -> None:
    overview = softcache("--help").stdout
    for command in COMMANDS:
        result = softcache(command, "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith(f"Usage: main {command} ")
        assert f"\n  {command} " in overview
    assert set(COMMANDS) <= set(main.commands)


def test_arguments_have_a_heading_if_there_is_more_to_say_than_their_name() -> None:
    for command in COMMANDS:
        lines = softcache(command, "--help").stdout.splitlines()
        headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert headings.index("Other:") == len(headings) - 1, command
        assert lines[lines.index("Other:") + 1].startswith("  -h, --help"), command

    class Explained(click.Argument):
        def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
            return ("FILE", "What to read.")

    params = [click.Option(["--first"], help="One."), Explained(["file"])]
    explained = Command("x", params=params)
    text = CliRunner().invoke(explained, ["--help"]).stdout
    assert text.index("Arguments:\n  FILE  What to read.") < text.index("--first")


def test_the_version_is_the_packages() -> None:
    result = softcache("--version")
    assert result.exit_code == 0
    assert result.stdout.strip().endswith(f"version {__version__}")


def test_an_option_has_the_default_of_its_setting() -> None:
    arguments = ["--data=d", "--out=o"]
    options = main.commands["dump"].make_context("dump", ["--teacher=mlp:4", *arguments]).params
    del options["dry_run"]  # not a setting
    options["first_view"], options["views"] = options["views"]
    check_defaults(DumpConfig(**options))
    options = main.commands["train"].make_context("train", ["--student=mlp:4", *arguments]).params
    variants = make_variants(*(options.pop(name) for name in ("student", "grid", "tables")))
    assert variants == [{"student": "mlp:4"}]
    config = make_train_config(students=variants, **options)
    check_defaults(config)
    check_defaults(config.students[0])


def check_defaults(config: DumpConfig | TrainConfig | StudentConfig) -> None:
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and field.name not in ("data", "caches"):
            assert (getattr(config, field.name) or None) == (field.default or None), field.name


def test_options_have_one_name_and_one_type_in_all_commands() -> None:
    """Whether an option is repeatable, and its default, can differ between commands."""
    first_seen: dict[str, tuple[str, str]] = {}
    for command in main.commands.values():
        for param in command.params:
            if isinstance(param, click.Option):
                name = max(param.opts, key=len)
                kind = f"{param.type.name} {getattr(param.type, 'choices', '')}"
                if (command.name, name) not in TYPES_THAT_DIFFER:
                    first, expected = first_seen.setdefault(name, (str(command.name), kind))
                    assert kind == expected, f"{name} of {command.name} and {first}"


TYPES_THAT_DIFFER = {
    ("train", "--precision"),  # only a dump has tf32
    ("train", "--batch-size"),  # only a dump has auto
    ("pull", "--views"),  # a range, not a number
}


def test_info_tells_people_what_the_header_says(workspace: Workspace) -> None:
    shown = softcache("info", workspace.cache.path).stdout
    for line in (
        f"content      {workspace.cache.content_id()}",
        "samples      300 of npz:tiny.npz@train, 1 view(s), augmented by nothing, seed 0",
        "classes      5: 0, 1, 2, 3, 4",
        "temperature  4",
    ):
        assert f"{line}\n" in shown


def test_info_tells_programs_the_same(workspace: Workspace) -> None:
    facts = json.loads(softcache("info", workspace.cache.path, "--json").stdout)
    assert facts["complete"] is True
    assert facts["coverage"] == 1.0
    assert facts["content_id"] == workspace.cache.content_id()
    assert facts["bytes_per_sample"] == workspace.cache.path.stat().st_size / 300
    assert facts["evaluation"]["samples"] == 100
    assert facts["summary"]["rows"] == 300


def test_verify_tells_the_content_id(workspace: Workspace) -> None:
    content_id = workspace.cache.content_id()
    result = softcache("verify", workspace.cache.path, "--expect", content_id)
    assert result.exit_code == 0
    assert result.stdout == f"{workspace.cache.path}: intact, content id {content_id}\n"


# processes
def test_a_process_tells_an_error_like_the_rest(run: Run) -> None:
    result = run("info", "nowhere.h5")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == (
        "Error: nowhere.h5: No such file or directory; expected a cache made by softcache dump\n"
    )


def imported(program: str, *arguments: str | Path) -> set[str]:
    """The modules that a process has loaded at the end of `program`."""
    program += "\nimport sys\nprint('\\nloaded', *sys.modules)"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split()[1:])


INFO = "import sys; from softcache.cli.app import main; main(sys.argv[1:], standalone_mode=False)"


def test_torch_is_imported_only_where_it_is_used(cache: Cache) -> None:
    slow = {"torch", "accelerate", "h5py", "safetensors"}
    assert not slow & imported("import softcache")
    assert not slow & imported("import softcache.cli.app")
    for options in ([], ["--json"]):
        modules = imported(INFO, "info", cache.path, *options)
        assert "softcache.files.describe" in modules
        assert not slow & modules


def test_an_import_of_torch_would_be_noticed() -> None:
    assert "torch" in imported("import softcache.losses")

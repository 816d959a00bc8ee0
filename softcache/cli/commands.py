"""What all commands share: options in groups, options from settings, errors in one line."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_type_hints

import click

from softcache.cli.params import BatchSize, Shard, ViewRange
from softcache.errors import Interrupted, SoftcacheError
from softcache.util.settings import Setting, option_name, settings_of

PATH = click.Path(path_type=Path)
OUTPUT = "Output"
CONTEXT = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}

# settings that are written in another way than their type says, by their metavar
PARAMS: dict[str, click.ParamType[Any]] = {
    "N|A:B": ViewRange(),
    "I/N": Shard(),
    "N|auto": BatchSize(),
}
WRITTEN_DEFAULTS = {"views": "1", "shard": "0/1"}
SHORT = {"out": "-o"}
# options that had another name before 0.2
RENAMED = {
    "--clip": "--max-grad-norm",
    "--accumulate": "--micro-batches",
    "--mixed-precision": "--precision",
    "--holds": "--teacher-output",
    "--softened": "--teacher-temperature",
}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """An option that `--help` shows under a heading."""

    def __init__(self, *arguments: Any, group: str = "Options", **facts: Any) -> None:
        self.group = group
        super().__init__(*arguments, **facts)


class Command(click.Command):
    """A command whose `--help` shows its options under headings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take options by their names before 0.2 too."""
        for number, word in enumerate(args):
            name, equals, value = word.partition("=")
            if name in RENAMED and any(RENAMED[name] in param.opts for param in self.params):
                click.echo(f"note: {name} is now called {RENAMED[name]}", err=True)
                args[number] = f"{RENAMED[name]}{equals}{value}"
                if name == "--mixed-precision" and args[number + 1 : number + 2] == ["no"]:
                    args[number + 1] = "fp32"
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group of options, in the order in which the groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                groups.setdefault(getattr(param, "group", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class Commands(click.Group):
    """Prints softcache's own errors in one line, and exits with their code."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; the library's log goes to the terminal meanwhile."""
        try:
            with show_log():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Error: stopped before any work was done", err=True)
            raise click.exceptions.Exit(Interrupted.exit_code) from None
        except (SoftcacheError, OSError) as error:
            if ctx.params.get("traceback"):
                raise
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error


class _Terminal(logging.Handler):
    """Findings to stdout, warnings and progress to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        click.echo(text, err=is_warning or record.name.endswith(".progress"))


@contextmanager
def show_log() -> Iterator[None]:
    """Show the library's log on the terminal."""
    log = logging.getLogger("softcache")
    if any(isinstance(handler, _Terminal) for handler in log.handlers):
        yield  # the demo runs commands within a command
        return
    handler, level = _Terminal(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def option(*names: str, group: str = "Options", **facts: Any) -> Decorator:
    """An option under a heading."""
    return click.option(*names, cls=Option, group=group, **facts)


def out_option(help: str, *, required: bool = True, **facts: Any) -> Decorator:
    """`--out/-o`, the same in every command."""
    return option("-o", "--out", type=PATH, required=required, help=help, group=OUTPUT, **facts)


def settings_options(
    *configs: type, only: Sequence[str] = (), repeatable: Sequence[str] = ()
) -> Decorator:
    """The options of the settings of one or more dataclasses, group by group.

    Args:
        only: names of fields; by default all that are settings.
        repeatable: names of fields of which the command takes several, or none.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for add_option in reversed(list(_options(configs, only, repeatable))):
            command = add_option(command)
        return command

    return decorate


def _options(
    configs: Sequence[type], only: Sequence[str], repeatable: Sequence[str]
) -> Iterator[Decorator]:
    fields = [
        (field, facts, str(get_type_hints(config)[field.name]))
        for config in configs
        for field, facts in settings_of(config)
        if not only or field.name in only
    ]
    groups = list(dict.fromkeys(facts.group for _, facts, _ in fields))
    for field, facts, hint in sorted(fields, key=lambda entry: groups.index(entry[1].group)):
        yield _option(field, facts, hint, repeatable=field.name in repeatable)


def _option(
    field: dataclasses.Field[Any], facts: Setting, hint: str, *, repeatable: bool
) -> Decorator:
    name = option_name(field)
    common: dict[str, Any] = {"group": facts.group, "help": facts.help}
    common["show_default"] = facts.default_text or field.default is not None
    if hint == "<class 'bool'>":
        flag = f"--{name}/--no-{name}" if field.default else f"--{name}"
        common["show_default"] = bool(field.default)
        return option(flag, field.name, is_flag=True, default=field.default, **common)
    special = PARAMS.get(facts.metavar or "")
    several = repeatable or ("Sequence" in hint and special is None)
    required = field.default is MISSING and not repeatable
    if not required and not several:
        common["default"] = WRITTEN_DEFAULTS.get(field.name, field.default)
    if several:
        common["show_default"] = facts.default_text or False
    names = [*([SHORT[field.name]] if field.name in SHORT else []), f"--{name}", field.name]
    return option(
        *names,
        type=special or _type(facts, hint),
        multiple=several,
        required=required,
        metavar=facts.metavar,
        **common,
    )


def _type(facts: Setting, hint: str) -> Any:  # noqa: ANN401  # what click takes for a type
    if facts.choices:
        return click.Choice(facts.choices)
    types = {"Path": PATH, "float": float, "int": int}
    return next((kind for word, kind in types.items() if word in hint), str)

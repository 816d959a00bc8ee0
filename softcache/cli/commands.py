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
from softcache.errors import Interrupted, SoftcacheError, printable
from softcache.util.bus_error import bus_errors_explained
from softcache.util.settings import Setting, option_name, settings_of
from softcache.util.signals import forget_interrupt, stop_signals
from softcache.util.urls import is_url, public_url, without_secrets


class FilePath(click.Path):
    """A path; a URL is refused, without printing what may be secret in it."""

    def convert(
        self,
        value: Any,  # noqa: ANN401  # as click.Path
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401
        """The value as a Path."""
        if is_url(str(value)):
            url = public_url(str(value))
            self.fail(f"{url} is a URL; expected a path: fetch the file with softcache pull")
        return super().convert(value, param, ctx)


PATH = FilePath(path_type=Path)
ARGUMENTS = "Arguments"
OUTPUT = "Output"
CONTEXT = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}

# types of settings that have a syntax of their own, by metavar
PARAMS: dict[str, click.ParamType[Any]] = {
    "N|A:B": ViewRange(),
    "I/N": Shard(),
    "N|auto": BatchSize(),
}
WRITTEN_DEFAULTS = {"views": "1", "shard": "0/1"}
SHORT = {"out": "-o"}
# names of options before 0.2, and their names now
RENAMED = {
    "--clip": "--max-grad-norm",
    "--accumulate": "--micro-batches",
    "--mixed-precision": "--precision",
    "--holds": "--teacher-output",
    "--softened": "--teacher-temperature",
}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """An option that `--help` lists under the heading `group`."""

    def __init__(self, *arguments: Any, group: str = "Options", **attributes: Any) -> None:
        self.group = group
        super().__init__(*arguments, **attributes)


class Command(click.Command):
    """A command whose `--help` groups its options under headings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Accept options by their names before 0.2, with a note on stderr."""
        for index, argument in enumerate(args):
            name, equals, value = argument.partition("=")
            if name in RENAMED and any(RENAMED[name] in param.opts for param in self.params):
                click.echo(f"note: {name} is now called {RENAMED[name]}", err=True)
                args[index] = f"{RENAMED[name]}{equals}{value}"
                if name == "--mixed-precision" and args[index + 1 : index + 2] == ["no"]:
                    args[index + 1] = "fp32"
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments that have a help text, then the groups of options as they first appear."""
        groups: dict[str, list[tuple[str, str]]] = {ARGUMENTS: []}
        for param in self.get_params(ctx):
            is_argument = isinstance(param, click.Argument)
            record = param.get_help_record(ctx)
            # the usage line names every argument: without a help text, there is no more to say
            if record and (record[1] or not is_argument):
                group = ARGUMENTS if is_argument else getattr(param, "group", "Other")
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


class Commands(click.Group):
    """A group that prints softcache's own errors in one line, and exits with their exit code."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command with the library's log on the terminal."""
        with bus_errors_explained(), stop_signals() as stop:
            try:
                with show_log():
                    return super().invoke(ctx)
            except KeyboardInterrupt:
                forget_interrupt()
                click.echo("Error: stopped before any work was done", err=True)
                raise click.exceptions.Exit(stop.exit_code) from None
            except (SoftcacheError, OSError) as error:
                if ctx.params.get("traceback"):
                    raise
                click.echo(f"Error: {printable(without_secrets(str(error)))}", err=True)
                stopped = isinstance(error, Interrupted)
                forget_interrupt()
                code = stop.exit_code if stopped else getattr(error, "exit_code", 1)
                raise click.exceptions.Exit(code) from error


class _Terminal(logging.Handler):
    """Prints results to stdout, warnings and progress to stderr.

    Attributes:
        held: results that cannot be right, which are printed last; None to print them at once.
    """

    held: list[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.endswith(".verdict") and self.held is not None:
            self.held.append(record.getMessage())
            return
        is_warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        click.echo(text, err=is_warning or record.name.endswith(".progress"))


@contextmanager
def show_log(*, verdicts_last: bool = True) -> Iterator[None]:
    """Show the library's log on the terminal inside the block.

    Args:
        verdicts_last: print results that cannot be right at the end of the block, where they are seen.
    """
    log = logging.getLogger("softcache")
    # the demo runs commands within a command
    shown = next((handler for handler in log.handlers if isinstance(handler, _Terminal)), None)
    handler, level, held = shown or _Terminal(), log.level, shown.held if shown else None
    if shown is None:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    handler.held = [] if verdicts_last else None
    try:
        yield
    finally:
        verdicts, handler.held = handler.held or [], held
        if shown is None:
            log.removeHandler(handler)
            log.setLevel(level)
        for text in dict.fromkeys(verdicts):
            click.echo(f"warning: {text}", err=True)


def option(*names: str, group: str = "Options", **attributes: Any) -> Decorator:
    """An option that `--help` lists under the heading `group`; otherwise as click.option()."""
    return click.option(*names, cls=Option, group=group, **attributes)


def out_option(help: str, *, required: bool = True, **attributes: Any) -> Decorator:
    """The option `--out/-o`, which has the same name and type in every command."""
    return option(
        "-o", "--out", type=PATH, required=required, help=help, group=OUTPUT, **attributes
    )


def settings_options(
    *configs: type, only: Sequence[str] = (), repeatable: Sequence[str] = ()
) -> Decorator:
    """Add an option for each setting of one or more dataclasses, group by group.

    Args:
        configs: the dataclasses, whose fields are declared with setting().
        only: names of the fields to add; all settings by default.
        repeatable: names of fields whose option can be given any number of times, or not at all.
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
        (field, setting, str(get_type_hints(config)[field.name]))
        for config in configs
        for field, setting in settings_of(config)
        if not only or field.name in only
    ]
    groups = list(dict.fromkeys(setting.group for _, setting, _ in fields))
    for field, setting, hint in sorted(fields, key=lambda entry: groups.index(entry[1].group)):
        yield _option(field, setting, hint, repeatable=field.name in repeatable)


def _option(
    field: dataclasses.Field[Any], setting: Setting, hint: str, *, repeatable: bool
) -> Decorator:
    name = option_name(field)
    common: dict[str, Any] = {"group": setting.group, "help": setting.help}
    common["show_default"] = setting.default_text or field.default is not None
    if hint == "<class 'bool'>":
        flag = f"--{name}/--no-{name}" if field.default else f"--{name}"
        common["show_default"] = bool(field.default)
        return option(flag, field.name, is_flag=True, default=field.default, **common)
    own_type = PARAMS.get(setting.metavar or "")
    multiple = repeatable or ("Sequence" in hint and own_type is None)
    required = field.default is MISSING and not repeatable
    if not required and not multiple:
        common["default"] = WRITTEN_DEFAULTS.get(field.name, field.default)
    if multiple:
        common["show_default"] = setting.default_text or False
    if setting.flag_value is not None:
        common |= {"is_flag": False, "flag_value": setting.flag_value, "show_default": False}
    names = [*([SHORT[field.name]] if field.name in SHORT else []), f"--{name}", field.name]
    return option(
        *names,
        type=own_type or _type(setting, hint),
        multiple=multiple,
        required=required,
        metavar=setting.metavar,
        **common,
    )


def _type(setting: Setting, hint: str) -> Any:  # noqa: ANN401  # anything that click accepts as a type
    if setting.choices:
        return click.Choice(setting.choices)
    types = {"Path": PATH, "float": float, "int": int}
    return next((option_type for name, option_type in types.items() if name in hint), str)

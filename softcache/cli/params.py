"""Parameter types for options with a syntax of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from softcache.errors import SettingsError


class Numbers(click.ParamType[tuple[int, int]]):
    """A range such as `8:16`, converted to (first, count)."""

    name = "range"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", str(value))
        first, end = (int(match[1]), int(match[2])) if match else (0, 0)
        if end <= first:
            self.fail(f"{value!r}: expected A:B, from A to B - 1, such as 0:10000")
        return first, end - first


class ViewRange(click.ParamType[tuple[int, int]]):
    """A number of views such as `16`, or a range such as `8:16`, converted to (first view, count)."""

    name = "views"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(?:(\d{1,15}):)?(\d{1,15})", str(value))
        first, end = (int(match[1] or 0), int(match[2])) if match else (0, 0)
        if end <= first:
            self.fail(f"{value!r}: expected a number of views, 1 or more, or a range such as 8:16")
        return first, end - first


class BatchSize(click.ParamType[int]):
    """A number, or `auto`, which is converted to 0."""

    name = "batch size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if value == "auto":
            return 0
        if not re.fullmatch(r"[1-9]\d{0,8}", str(value)):
            self.fail(f"{value!r}: expected a number, 1 or more, or auto")
        return int(str(value))


class Shard(click.ParamType[tuple[int, int]]):
    """One of several shards, `0/4` to `3/4`, converted to (0, 4) to (3, 4)."""

    name = "shard"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,15})/(\d{1,15})", str(value))
        if not match or int(match[1]) >= int(match[2]):
            self.fail(f"{value!r}: expected i/n with i from 0 to n - 1, such as 0/4")
        return int(match[1]), int(match[2])


def read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Any:  # noqa: ANN401
    """Use the options in a file as defaults of the command, and return its [[student]] tables.

    Raises:
        SettingsError: the file cannot be read, or names an option that the command does not have.
    """
    if value is None:
        return []
    from softcache.train.grid import read_toml

    options, students = read_toml(value)
    options_by_name = {
        flag.removeprefix("--").replace("-", "_"): param
        for param in ctx.command.params
        if isinstance(param, click.Option)
        for flag in param.opts
    }
    defaults: dict[str, Any] = {}
    for name, setting in options.items():
        if name not in options_by_name:
            raise SettingsError(
                f"--config {value}: {name!r} is not an option of softcache train; see softcache train --help"
            )
        option = options_by_name[name]
        # as text, so that click converts and checks it like an argument
        as_text = setting if isinstance(setting, bool) else str(setting)
        items = setting if isinstance(setting, list) else [setting]
        defaults[str(option.name)] = [str(item) for item in items] if option.multiple else as_text
    ctx.default_map = defaults
    return students

"""Options of the command line that are more than a text or a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from softcache.errors import SettingsError


class Numbers(click.ParamType[tuple[int, int]]):
    """`8:16`, as (first, how many)."""

    name = "range"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,15}):(\d{1,15})", str(value))
        first, end = (int(found[1]), int(found[2])) if found else (0, 0)
        if end <= first:
            self.fail(f"{value!r}: expected A:B, from A up to B without it, such as 0:10000")
        return first, end - first


class ViewRange(click.ParamType[tuple[int, int]]):
    """`16` or `8:16`, as (first view, how many)."""

    name = "views"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        found = re.fullmatch(r"(?:(\d{1,15}):)?(\d{1,15})", str(value))
        first, end = (int(found[1] or 0), int(found[2])) if found else (0, 0)
        if end <= first:
            self.fail(f"{value!r}: expected a number of views from 1 up, or a range such as 8:16")
        return first, end - first


class BatchSize(click.ParamType[int]):
    """A number, or `auto`, which is 0."""

    name = "batch size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if value == "auto":
            return 0
        if not re.fullmatch(r"[1-9]\d{0,8}", str(value)):
            self.fail(f"{value!r}: expected a number from 1 up, or auto")
        return int(str(value))


class Shard(click.ParamType[tuple[int, int]]):
    """`0/4` to `3/4`, as (0, 4) to (3, 4)."""

    name = "shard"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        found = re.fullmatch(r"(\d{1,15})/(\d{1,15})", str(value))
        if not found or int(found[1]) >= int(found[2]):
            self.fail(f"{value!r}: expected i/n with i from 0 to n - 1, such as 0/4")
        return int(found[1]), int(found[2])


def read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Any:  # noqa: ANN401
    """Options from a file stand where the command line gives none; its students are handed on."""
    if value is None:
        return []
    from softcache.train.grid import read_toml

    options, students = read_toml(value)
    known = {
        name.removeprefix("--").replace("-", "_"): option
        for option in ctx.command.params
        if isinstance(option, click.Option)
        for name in option.opts
    }
    found: dict[str, Any] = {}
    for key, given in options.items():
        if key not in known:
            raise SettingsError(f"--config {value}: {key!r} is no option of softcache train")
        several = [str(one) for one in (given if isinstance(given, list) else [given])]
        # as text, so that it is read as the command line is
        as_text = given if isinstance(given, bool) else str(given)
        found[str(known[key].name)] = several if known[key].multiple else as_text
    ctx.default_map = found
    return students

"""Specifications such as `hf:vit?hidden_size=192` or `folder:images@test`, parsed once.

The general form is KIND:PLACE?OPTION=VALUE&…@SPLIT. In a place, %3F stands for ?, %40 for @ and %25 for %,
which otherwise mean something else; %23 (#) and %3A (:) are understood too. The tables of kinds are in
`data/spec.py`, `models/spec.py` and `teachers/spec.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from softcache.errors import SettingsError

ESCAPED = re.compile("%(25|3[Ff]|40|23|3[Aa])")
CODE = "code"  # the kind of FILE.py:CALLABLE and package.module:CALLABLE
LOCAL_OPTIONS = ("processor", "tokenizer")  # of models, whose values may be folders on this machine
MASKS = "masks"  # of data, the same


@dataclass(frozen=True)
class Kind:
    """An entry in a table of kinds.

    Attributes:
        form: how a specification of this kind is written.
        meaning: what it stands for, in a phrase.
        handler: the `module:function` that opens or builds it; imported when it is first needed.
        options: names of the options that it takes; None if the handler checks them itself.
        file: whether the place is a file; its folder is left out of the public name.
    """

    form: str
    meaning: str
    handler: str = ""
    options: tuple[str, ...] | None = ()
    file: bool = False

    def load(self) -> Callable[..., Any]:
        """Import the handler."""
        module, _, function = self.handler.partition(":")
        handler: Callable[..., Any] = getattr(import_module(module), function)
        return handler


@dataclass(frozen=True)
class Spec:
    """A parsed specification.

    Attributes:
        text: the specification as the user wrote it.
        kind: a key of a table of kinds, or CODE.
        place: a file, folder, module, hub id, or layer sizes.
        attribute: the name of the callable, if the kind is CODE.
        options: the options after the `?`.
        split: the split after the `@`; empty if there is none.
        file: whether the place is a file; its folder is left out of the public name.
        trusted: whether a file that may run code is opened all the same.
        defaults: options that count where none are given; they are not part of the public name.
        task: what a model is for, where its own files leave that open: a unit of rows, such as `token`.
        teacher: whether a model is to be used as it is, so that it needs all its weights.
    """

    text: str
    kind: str
    place: str
    attribute: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    file: bool = False
    trusted: bool = False
    defaults: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    teacher: bool = False

    @property
    def path(self) -> Path:
        """The place as a path."""
        return Path(self.place)

    @property
    def public_name(self) -> str:
        """The specification without local folders: safe to write into a shared file."""
        split = f"@{self.split}" if self.split else ""
        if self.kind == CODE:
            file = escape(self.path.name).replace(":", "%3A")
            return f"{file}:{self.attribute}{_query(self.options)}{split}"
        place = escape(self.path.name if self.file else _public_place(self.place))
        options = {
            name: _public_place(value) if name in (*LOCAL_OPTIONS, MASKS) else value
            for name, value in self.options.items()
        }
        # the kind may follow from the file's suffix alone
        prefix = f"{self.kind}:" if self.text.startswith(f"{self.kind}:") else ""
        return f"{prefix}{place}{_query(options)}{split}"


def unescape(place: str) -> str:
    """A place with %3F, %40, %23, %3A and %25 as the characters ? @ # : and % that they stand for."""
    return ESCAPED.sub(lambda match: chr(int(match[1], 16)), place)


def escape(place: str) -> str:
    """The reverse of unescape(), for characters that would end the place or begin an escape."""
    return re.sub(r"[?@]|%(?=25|3[Ff]|40|23|3[Aa])", lambda match: f"%{ord(match[0]):02X}", place)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """Split a text at its first `?` into the part before it and the options after it.

    Raises:
        SettingsError: an option has no value, or is given twice.
    """
    place, mark, query = text.partition("?")
    if not mark:
        return unescape(text), {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise SettingsError(
            f"{text!r}: options are written NAME=VALUE, separated by &, after the ?"
        ) from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise SettingsError(f"{text!r} repeats an option; give each option once")
    return unescape(place), options


def split_callable(text: str) -> tuple[str, str]:
    """Split FILE.py:CALLABLE or package.module:CALLABLE at its last colon; a path may contain colons."""
    place, _, attribute = text.rpartition(":")
    return place, attribute


def check_options(options: Mapping[str, str], known: Collection[str], text: str) -> None:
    """Raise SettingsError for the first option, in alphabetical order, that is not in `known`."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        expected = ", ".join(known) or "none"
        raise SettingsError(f"{text!r}: unknown option {unknown[0]!r}; expected {expected}")


def forms(kinds: Mapping[str, Kind]) -> str:
    """The forms of all these kinds in one phrase, for messages."""
    *others, last = [kind.form for kind in kinds.values()]
    return f"{', '.join(others)} or {last}"


def _public_place(place: str) -> str:
    """The bare name of a file or folder on this machine; anything else, such as a hub id, unchanged."""
    prefix = "local-dir:" if place.startswith("local-dir:") else ""
    path = Path(place.removeprefix(prefix)).expanduser()
    local = path.exists() or place.removeprefix(prefix).startswith(("/", ".", "~"))
    return prefix + (path.resolve().name if local else place.removeprefix(prefix))


def _query(options: Mapping[str, str]) -> str:
    """The options as they are written after a place, sorted by name; empty if there are none."""
    query = "&".join(f"{name}={value}" for name, value in sorted(options.items()))
    return f"?{query}" if query else ""

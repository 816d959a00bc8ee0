"""Specifications such as `hf:vit?hidden_size=192` or `folder:images@test`, parsed once.

What is parsed here is written KIND:PLACE?OPTION=VALUE&…@SPLIT. Which kinds there are is said in one
table in each room that has some: `data/spec.py`, `models/spec.py`, `teachers/spec.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from softcache.errors import SettingsError

CODE = "code"  # the kind of FILE.py:CALLABLE and package.module:CALLABLE
LOCAL_OPTIONS = ("processor", "tokenizer")  # options whose values may be folders of this machine


@dataclass(frozen=True)
class Kind:
    """An entry in a table of kinds.

    Attributes:
        form: how a specification of this kind is written.
        meaning: what it names, in a phrase.
        handler: `module:function` that opens or builds it; imported when it is first needed.
        options: names of the options it takes; None if it checks them itself.
        file: whether its place is a file, known to others by its name alone.
    """

    form: str
    meaning: str
    handler: str = ""
    options: tuple[str, ...] | None = ()
    file: bool = False

    def load(self) -> Callable[..., Any]:
        """The handler."""
        module, _, function = self.handler.partition(":")
        handler: Callable[..., Any] = getattr(import_module(module), function)
        return handler


@dataclass(frozen=True)
class Spec:
    """A specification, taken apart.

    Attributes:
        text: as the user wrote it.
        kind: a key of the room's table of kinds, or CODE.
        place: a file, folder, module, id on a hub, or sizes of layers.
        attribute: the callable, if the kind is CODE.
        options: what stands behind the `?`.
        split: what stands behind the `@`.
        file: whether the place is a file, known to others by its name alone.
    """

    text: str
    kind: str
    place: str
    attribute: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    file: bool = False

    @property
    def path(self) -> Path:
        """The place as a path."""
        return Path(self.place)

    @property
    def public_name(self) -> str:
        """The specification without folders of this machine: safe to write into a shared file."""
        split = f"@{self.split}" if self.split else ""
        if self.kind == CODE:
            return f"{self.path.name}:{self.attribute}{split}"
        place = self.path.name if self.file else _public_place(self.place)
        options = {
            name: _public_place(value) if name in LOCAL_OPTIONS else value
            for name, value in self.options.items()
        }
        # a file may tell its kind by its ending alone
        prefix = f"{self.kind}:" if self.text.startswith(f"{self.kind}:") else ""
        return f"{prefix}{place}{_query(options)}{split}"


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first `?`, and the options behind it.

    Raises:
        SettingsError: an option has no value, or is given twice.
    """
    place, mark, query = text.partition("?")
    if not mark:
        return text, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise SettingsError(
            f"{text!r}: options are written NAME=VALUE, separated by &, after the ?"
        ) from error
    options = dict(pairs)
    if len(options) < len(pairs):
        raise SettingsError(f"{text!r} has an option twice; give each once")
    return place, options


def split_callable(text: str) -> tuple[str, str]:
    """Place and callable of FILE.py:CALLABLE or package.module:CALLABLE; a path may hold colons."""
    place, _, attribute = text.rpartition(":")
    return place, attribute


def check_options(options: Mapping[str, str], known: Collection[str], text: str) -> None:
    """Raise SettingsError for the first option that is not known."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        expected = ", ".join(known) or "none"
        raise SettingsError(f"{text!r}: unknown option {unknown[0]!r}; expected {expected}")


def forms(kinds: Mapping[str, Kind]) -> str:
    """How specifications of all these kinds are written, for messages."""
    listed = [kind.form for kind in kinds.values()]
    return f"{', '.join(listed[:-1])} or {listed[-1]}"


def _public_place(place: str) -> str:
    """A file or folder of this machine by its name alone, anything else (an id on a hub) as it is."""
    prefix = "local-dir:" if place.startswith("local-dir:") else ""
    path = Path(place.removeprefix(prefix)).expanduser()
    local = path.exists() or place.removeprefix(prefix).startswith(("/", ".", "~"))
    return prefix + (path.resolve().name if local else place.removeprefix(prefix))


def _query(options: Mapping[str, str]) -> str:
    """Options as they are written after a place, sorted; the empty text if there are none."""
    query = "&".join(f"{name}={value}" for name, value in sorted(options.items()))
    return f"?{query}" if query else ""

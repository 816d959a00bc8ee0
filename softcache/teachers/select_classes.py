"""Some classes of a wider teacher, in an order of one's own: --teacher-classes."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.errors import MissingFileError, SettingsError
from softcache.teachers.outputs import ENOUGH_ROWS
from softcache.teachers.teacher import Teacher
from softcache.types import RowIndex
from softcache.util.log import warn

SMALL_SHARE = (
    0.5  # of the teacher's probability, below which the chosen classes are probably the wrong ones
)
RANGE = re.compile(r"(\d{1,15})-(\d{1,15})", re.ASCII)


@dataclass(frozen=True)
class SelectedClasses(Teacher):
    """A teacher of more classes, of which only some are used, as select_classes() makes it.

    Its probabilities are those of the chosen classes, divided by their sum.

    Attributes:
        columns: the teacher's columns that are its classes, in order.
        wide_classes: number of columns of the teacher's output.
    """

    columns: tuple[int, ...] = ()
    wide_classes: int = 0

    def logits(self, inputs: Tensor, samples: npt.NDArray[np.int64] | None = None) -> Tensor:
        """Logits (B, C) float32 of the chosen classes; see Teacher.logits()."""
        return self._chosen(super().logits(inputs, samples))

    def row_logits(
        self, inputs: Tensor, rows: RowIndex, samples: npt.NDArray[np.int64] | None = None
    ) -> Iterator[Tensor]:
        """Logits (n, C) of the chosen classes, a few rows at a time; see Teacher.row_logits()."""
        for wide in super().row_logits(inputs, rows, samples):
            yield self._chosen(wide)

    def _chosen(self, wide: Tensor) -> Tensor:
        """The columns of the chosen classes (n, C), of logits (n, all classes)."""
        chosen = wide.index_select(1, torch.tensor(self.columns, device=wide.device))
        if len(wide) >= ENOUGH_ROWS and "share" not in self.notes:
            self.notes.add("share")
            share = float((chosen.logsumexp(1) - wide.logsumexp(1)).exp().mean())
            if share < SMALL_SHARE:
                warn(
                    f"teacher {self.spec}: the chosen classes have only {share:.1%} of its probability on "
                    "the first samples; check --teacher-classes against the names of its classes"
                )
        return chosen

    @property
    def output_width(self) -> int:
        """Number of columns of the model's output."""
        return self.wide_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the chosen classes, in order; empty if the model only numbers its classes."""
        names = super().class_names
        return tuple(names[column] for column in self.columns) if names else ()


def select_classes(teacher: Teacher, columns: Sequence[int]) -> SelectedClasses:
    """The teacher with only some of its classes.

    Args:
        teacher: a teacher whose number of classes is known.
        columns: what parse_classes() returns.
    """
    known = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(Teacher)}
    digest = hashlib.sha256(",".join(map(str, columns)).encode()).hexdigest()
    selected = {"classes": len(columns), "of": teacher.classes, "sha256": digest}
    return SelectedClasses(
        **known
        | {"classes": len(columns), "provenance": teacher.provenance | {"selected": selected}},
        columns=tuple(columns),
        wide_classes=teacher.classes or 0,
    )


def parse_classes(text: str, teacher_class_names: Sequence[str], width: int) -> list[int]:
    """The columns of a teacher that a list of its classes names, in the order of the list.

    Args:
        text: numbers from 0 on, ranges as in 0-9, and names, separated by commas; or a file with one of
            them in each line, in which a # at the start of a line or after a space begins a comment. A
            name that is itself a number is written in quotes.
        teacher_class_names: the teacher's names of its classes; empty if it only numbers them.
        width: the teacher's number of classes.

    Raises:
        SettingsError: a class does not exist or is listed twice, or there are fewer than two.
    """
    columns: list[int] = []
    for item, where in _items(text, teacher_class_names):
        for column in _columns(item, teacher_class_names, width, where):
            if column in columns:
                raise SettingsError(
                    f"{where}: class {_shown(column, teacher_class_names)} is listed twice; list each "
                    "class once"
                )
            columns.append(column)
    if len(columns) < 2:
        raise SettingsError(
            f"--teacher-classes {text!r} lists {len(columns)} class; expected at least 2"
        )
    return columns


def _items(text: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The single entries of a list or a file, each with where it is, for messages."""
    path = Path(text).expanduser()
    if not _is_file(path):
        if text not in names and (
            path.suffix in (".txt", ".csv", ".list") or ("/" in text and "," not in text)
        ):
            raise MissingFileError(f"--teacher-classes {text}: no such file")
        where = f"--teacher-classes {text if len(text) <= 60 else text[:57] + '...'}"
        yield from ((item, where) for item in _split(text, names))
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--teacher-classes {path} cannot be read as text: {error}") from error
    for number, line in enumerate(lines, 1):
        item = line.strip()
        if item not in names:
            item = re.sub(r"(^|\s)#.*", "", item).strip()
        if item:
            yield from ((part, f"{path}, line {number}") for part in _split(item, names))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a list too long for the name of a file
        return False


def _split(text: str, names: Sequence[str]) -> Iterator[str]:
    """The entries between commas; a name that contains commas stays whole."""
    parts = text.split(",")
    longest = 1 + max((name.count(",") for name in names), default=0)
    start = 0
    while start < len(parts):
        ends = range(min(len(parts), start + longest), start, -1)
        joined = {end: ",".join(parts[start:end]).strip() for end in ends}
        end = next((end for end in ends if _unquoted(joined[end]) in names), start + 1)
        yield joined[end]
        start = end


def _columns(item: str, names: Sequence[str], width: int, where: str) -> Sequence[int]:
    """The columns that one entry stands for."""
    quoted = _unquoted(item) != item
    if item.isdecimal() and len(item) < 16 and not quoted:
        named = [
            column for column, name in enumerate(names) if name == item and column != int(item)
        ]
        if named:
            raise SettingsError(
                f"{where}: {item} is the number of one class and the name of class {named[0]}; write "
                f'{item}-{item} for the number, or "{item}" in quotes for the name'
            )
        return [_checked(int(item), names, width, where)]
    matches = [column for column, name in enumerate(names) if name in (item, _unquoted(item))]
    if len(matches) > 1:
        raise SettingsError(
            f"{where}: {item!r} is the name of classes {' and '.join(map(str, matches))}; give the number"
        )
    if matches:
        return matches
    bounds = RANGE.fullmatch(item)
    if bounds is None:
        raise SettingsError(f"{where}: {_unknown(item, names, width)}")
    first, last = (_checked(int(bound), names, width, where) for bound in bounds.groups())
    if last < first:
        raise SettingsError(f"{where}: the range {item} is empty; expected {last}-{first}")
    return range(first, last + 1)


def _checked(column: int, names: Sequence[str], width: int, where: str) -> int:
    if column >= width:
        raise SettingsError(
            f"{where}: there is no class {column}; the teacher has {width:,} classes, 0 to {width - 1}"
        )
    return column


def _unknown(item: str, names: Sequence[str], width: int) -> str:
    """Why an entry stands for no class."""
    if not item:
        return "an empty entry; expected a number, a range or a name between the commas"
    if not names:
        return (
            f"{item!r} is not a number, and the teacher does not name its classes; give numbers from 0 to "
            f"{width - 1}"
        )
    same = [name for name in names if name.lower() == item.lower()]
    similar = same or [name for name in names if item.lower() in re.split(r",\s*", name.lower())]
    similar = similar or difflib.get_close_matches(item, names, n=1)
    meant = f"did you mean {similar[0]!r}?" if similar else f"its classes are {_first(names)}"
    return f"the teacher has no class {item!r}; {meant}"


def _unquoted(item: str) -> str:
    quoted = len(item) > 1 and item[0] == item[-1] and item[0] in "\"'"
    return item[1:-1] if quoted else item


def _shown(column: int, names: Sequence[str]) -> str:
    return f"{column} ({names[column]!r})" if names else str(column)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more

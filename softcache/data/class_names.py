"""Classes by name: are those of two places the same, and which label of the one is which of the other?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from softcache.cache import Cache
from softcache.data.source import UNLABELLED, Source, WrappedSource, has_label_sets
from softcache.errors import DataError
from softcache.util.log import inform

SHOWN = 5  # names in a message
WORDNET_ID = re.compile(r"n\d{8}")  # as ImageNet's folders are called
DEFAULT_NAME = re.compile(r"LABEL_\d+")  # as transformers calls classes without a name


@dataclass(frozen=True)
class MappedSource(WrappedSource):
    """A source whose labels are numbered as another source, teacher or cache numbers its classes."""

    mapping: tuple[int, ...]  # by label of the source
    class_names: tuple[str, ...]

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """(N,) all labels, if the source knows them without being read."""
        labels = getattr(self.source, "labels", None)
        if labels is None or has_label_sets(self.source):
            return labels
        return self._mapped(labels)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Raw inputs (B, *shape) and labels (B,) of the samples at `indices`."""
        inputs, labels = self.source.fetch(indices)
        if labels.ndim == 2:
            sets = np.zeros((len(labels), len(self.class_names)), np.int64)
            sets[:, list(self.mapping)] = labels
            sets[labels[:, 0] < 0] = UNLABELLED
            return inputs, sets
        return inputs, self._mapped(labels)

    def _mapped(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        table = np.array([*self.mapping], np.int64)
        inside = (labels >= 0) & (labels < len(table))
        # a label out of range stays so, for the check of labels to name it
        beyond = np.where(labels < 0, UNLABELLED, labels - len(table) + len(self.class_names))
        return np.where(inside, table[np.where(inside, labels, 0)], beyond)


def align_classes(
    source: Source,
    names: Sequence[str],
    whose: str,
    *,
    same_classes: bool = False,
    quiet: bool = False,
) -> Source:
    """A source with its labels numbered as `names` are.

    Where one side names no classes, or only numbers them, there is nothing to compare. The same names
    in another order, or some of them, are mapped by name, and this is said.

    Args:
        names: the names of the classes in the order that is needed.
        whose: where these come from, for messages.
        same_classes: the classes are the same in the same order, whatever they are called.
        quiet: do not say that labels are mapped.

    Raises:
        DataError: the source has classes that `names` lacks.
    """
    own = tuple(source.class_names)
    if not own or not names or own == tuple(names):
        return source
    if same_classes:
        if len(own) > len(names):
            raise DataError(
                f"--same-classes: {source.name} has {len(own)} classes, and {whose} has {len(names)}; "
                "expected as many"
            )
        every = (*own, *names[len(own) :])
        return source if every == own else MappedSource(source, tuple(range(len(own))), every)
    mapping = match_names(own, names)
    if mapping is None:
        if _are_numbers(own, len(names)) or _are_numbers(names, len(own)):
            return source  # one side only numbers its classes
        raise DataError(_difference(source.name, own, whose, names))
    if mapping == tuple(range(len(names))):
        return source  # other ways of writing the same names
    in_order = list(mapping) == sorted(mapping)
    how = (
        f"{len(own)} of the {len(names)} classes of"
        if in_order
        else "its classes in another order than"
    )
    if not quiet:
        inform(f"note: {source.name} has {how} {whose}; its labels are mapped by name")
    return MappedSource(source, mapping, tuple(names))


def match_names(own: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """For each class in `own` its place in `names`; None unless that is certain for all.

    Names are compared as they are, then without regard to case, spaces, hyphens and underscores, and
    commas with what follows them, and zeros before a number; WordNet ids in ascending order stand for as
    many words.
    """
    for form in (str, normalized, first_words, without_zeros):
        known = {form(name): place for place, name in enumerate(names)}
        wanted = [form(name) for name in own]
        unique = len(known) == len(names) and len(set(wanted)) == len(own)
        if unique and all(name in known for name in wanted):
            return tuple(known[name] for name in wanted)
    ids = [bool(WORDNET_ID.fullmatch(name)) for name in (*own, *names)]
    if len(own) == len(names) and (all(ids[: len(own)]) != all(ids[len(own) :])):
        in_order = list(own if all(ids[: len(own)]) else names)
        # everybody numbers ImageNet's classes in the order of their ids
        if in_order == sorted(in_order) and len(in_order) >= 100:
            return tuple(range(len(own)))
    return None


def normalized(name: str) -> str:
    """A name without what is only a way of writing it."""
    return " ".join(re.sub(r"[\s_\-]+", " ", name).split()).casefold()


def first_words(name: str) -> str:
    """The first of several names of one class: `tench, Tinca tinca`."""
    return normalized(name.partition(",")[0])


def without_zeros(name: str) -> str:
    """A number as it is written without leading zeros: 7 for 07; any other name as it is."""
    return str(int(name)) if name.isascii() and name.isdecimal() and len(name) < 20 else name


def all_class_names(cache: Cache) -> tuple[str, ...]:
    """Every class of a cache by name."""
    return tuple(name.decode("utf-8", "replace") for name in cache.arrays["class_names"])


def _are_numbers(names: Sequence[str], classes: int) -> bool:
    """Whether names only number as many classes as the other side has."""
    if len(names) < classes:
        return False
    counted = all(name == str(number) for number, name in enumerate(names))
    return counted or all(DEFAULT_NAME.fullmatch(name) for name in names)


def _difference(source: str, own: Sequence[str], whose: str, names: Sequence[str]) -> str:
    missing = [name for name in own if name not in set(names)]
    lacking = [name for name in names if name not in set(own)]
    advice = (
        "add --same-classes if they are the same classes in the same order under other names, or name "
        "them with ?classes=A,B,… in the order of their labels"
    )
    return (
        f"{source} has {len(own)} classes, and {whose} {len(names)}: {_listed(missing)} of the former "
        f"are not among the latter ({_listed(lacking) if lacking else 'none'} of which are not matched); "
        f"{advice}"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more

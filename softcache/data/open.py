"""Open a data source from its specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from softcache.data.class_names import MappedSource, match_names
from softcache.data.source import ArraySource, Source
from softcache.data.spec import KINDS, NAMING_KINDS, named_classes, parse_data
from softcache.data.subset import parse_subset, subset
from softcache.errors import DataError, SettingsError

if TYPE_CHECKING:
    from softcache.data.user_dataset import DatasetSource


def open_source(
    text: str, *, skip_unreadable: bool = False, defaults: Mapping[str, str] | None = None
) -> Source:
    """Open a data specification; `softcache help specs` lists the forms.

    Options of every kind: classes=A,B (the names of labels 0, 1, …), shuffle=SEED (a random order) and
    samples=N (the first N samples of that order).

    Args:
        skip_unreadable: leave out image files that cannot be read; the same as `?unreadable=skip`.
        defaults: options of texts that count where the specification does not give them, such as the
            tokenizer of the model.

    Raises:
        SettingsError: the specification has no known form, or an invalid option.
        DataError: the files are missing or invalid, or hold no samples.
    """
    spec = replace(parse_data(text), defaults=defaults or {})
    if skip_unreadable:
        if "unreadable" not in (KINDS[spec.kind].options or ()):
            raise SettingsError(
                f"--skip-unreadable leaves out image files of folder: data, and {text} is {spec.kind}: data; "
                "leave it out"
            )
        spec = replace(spec, options={**spec.options, "unreadable": "skip"})
    shuffle, samples = parse_subset(spec.options, text)
    names = () if spec.kind in NAMING_KINDS else named_classes(spec.options, text)
    source: Source = KINDS[spec.kind].load()(spec)
    if len(source) == 0:
        raise DataError(f"data {text} holds no samples; expected at least one")
    if names:
        source = _with_classes(source, names)  # type: ignore[arg-type]  # those not in NAMING_KINDS
    return subset(source, shuffle, samples)


def name_of(text: str) -> str:
    """The name of a data set, which its options are part of; texts are not tokenized for it."""
    spec = parse_data(text)
    return spec.public_name if spec.kind in ("text", "jsonl", "ids") else open_source(text).name


def _with_classes(source: ArraySource | DatasetSource, names: tuple[str, ...]) -> Source:
    """The source with names for its labels, which are checked where they are all known."""
    if (
        isinstance(source, ArraySource) and source.class_names
    ):  # words, which have their own numbers
        order = match_names(source.class_names, names)
        if order is None:
            raise DataError(
                f"{source.name}: classes names {', '.join(names)[:200]}, and the labels are "
                f"{', '.join(source.class_names)[:200]}; expected a name for each of them"
            )
        return MappedSource(source, order, names)
    largest = int(source.labels.max()) if isinstance(source, ArraySource) else -1
    if largest >= len(names):
        raise DataError(
            f"{source.name}: classes names {len(names)} classes, {', '.join(names)[:200]}, and the data has "
            f"label {largest}; expected a name for each of the labels 0 to {largest}"
        )
    return replace(source, class_names=names)

"""Check that two data sets, caches or teachers have the same classes in the same order."""

from __future__ import annotations

from collections.abc import Sequence

from softcache.cache import Cache
from softcache.data.source import Source
from softcache.errors import DataError


def check_class_names(source: Source, names: Sequence[str], whose: str) -> None:
    """Raise DataError if a source does not have the classes `names`, in this order.

    If either side names no classes, or both only number them, there is nothing to compare.

    Args:
        whose: what `names` belong to, for the error message.
    """
    source_names = source.class_names
    numbered = all(name.isdecimal() for name in (*source_names, *names))
    if not source_names or not names or numbered or tuple(source_names) == tuple(names):
        return
    pairs = zip((*source_names, "none"), (*names, "none"), strict=False)
    label, (source_name, name) = next(
        (label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1]
    )
    raise DataError(
        f"{source.name} has {len(source_names)} classes and {whose} has {len(names)}; class {label} is "
        f"{source_name!r} in the first and {name!r} in the second, so labels would be compared with the "
        "wrong classes; give both the same classes in the same order"
    )


def all_class_names(cache: Cache) -> tuple[str, ...]:
    """The names of all classes of a cache."""
    return tuple(name.decode("utf-8", "replace") for name in cache.arrays["class_names"])

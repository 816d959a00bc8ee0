"""Are the classes of two places the same, in the same order?"""

from __future__ import annotations

from collections.abc import Sequence

from softcache.cache import Cache
from softcache.data.source import Source
from softcache.errors import DataError


def check_class_names(source: Source, names: Sequence[str], whose: str) -> None:
    """Raise DataError if the classes of a source are not those of `names`, in their order.

    Where one of them names no classes, or only numbers them, there is nothing to compare.
    """
    mine = source.class_names
    numbered = all(name.isdecimal() for name in (*mine, *names))
    if not mine or not names or numbered or tuple(mine) == tuple(names):
        return
    pairs = zip((*mine, "none"), (*names, "none"), strict=False)
    at, (own, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise DataError(
        f"{source.name} has {len(mine)} classes, and {whose} {len(names)}; class {at} is {own!r} in the one "
        f"and {theirs!r} in the other: labels would be compared with other classes. Give both the same "
        "classes, in the same order"
    )


def all_class_names(cache: Cache) -> tuple[str, ...]:
    """Every class of a cache by name."""
    return tuple(name.decode("utf-8", "replace") for name in cache.arrays["class_names"])

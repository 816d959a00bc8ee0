"""The samples of a cache: a data set with the cache's classes and columns, or those that it stores."""

from __future__ import annotations

from collections.abc import Mapping

from softcache.cache import Cache, Header
from softcache.data.class_names import align_classes, all_class_names
from softcache.data.embedded import source_of_cache
from softcache.data.open import open_source
from softcache.data.rows import layout_of_source
from softcache.data.source import Source
from softcache.data.table_columns import columns_of_cache
from softcache.data.tables import align_columns
from softcache.join.match import with_rows_of_cache


def token_options(header: Header) -> dict[str, str]:
    """The options of texts with which a cache was dumped: where they are cut, and what is predicted."""
    rows = header.rows or {}
    return {name: str(rows[name]) for name in ("length", "stride", "loss_on") if name in rows}


def open_samples(
    cache: Cache,
    data: str | None,
    *,
    same_classes: bool = False,
    defaults: Mapping[str, str] | None = None,
) -> Source:
    """Open the samples of a cache, with classes and columns matched by name.

    Args:
        data: the specification of the data; None for the samples that the cache stores.
        same_classes: the classes are the same in the same order, whatever they are called.
        defaults: options of texts, such as a tokenizer; by default those that the cache knows.

    Raises:
        DataError: the data cannot be read, or its classes or columns are not the cache's.
        SettingsError: the specification is invalid, or there is none and the cache stores no samples.
    """
    if data is None:
        return source_of_cache(cache)
    options = token_options(cache.header) if defaults is None else defaults
    source = align_columns(open_source(data, defaults=options), columns_of_cache(cache))
    if cache.header.rows is not None and layout_of_source(source) is None:
        return with_rows_of_cache(source, cache)
    return align_classes(source, all_class_names(cache), str(cache.path), same_classes=same_classes)

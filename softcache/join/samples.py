"""The samples of a cache: a data set with the cache's classes and columns, or those that it stores."""

from __future__ import annotations

from softcache.cache import Cache
from softcache.data.class_names import align_classes, all_class_names
from softcache.data.embedded import CacheSource
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.data.table_columns import columns_of_cache
from softcache.data.tables import align_columns


def open_samples(cache: Cache, data: str | None, *, same_classes: bool = False) -> Source:
    """Open the samples of a cache, with classes and columns matched by name.

    Args:
        data: the specification of the data; None for the samples that the cache stores.
        same_classes: the classes are the same in the same order, whatever they are called.

    Raises:
        DataError: the data cannot be read, or its classes or columns are not the cache's.
        SettingsError: the specification is invalid, or there is none and the cache stores no samples.
    """
    if data is None:
        return CacheSource(cache)
    source = align_columns(open_source(data), columns_of_cache(cache))
    return align_classes(source, all_class_names(cache), str(cache.path), same_classes=same_classes)

"""Check that an existing cache, finished or unfinished, belongs to the dump that was requested."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache import Cache, Header, open_cache
from softcache.cache.arrays import INPUTS
from softcache.cache.merge import OF_SAMPLES
from softcache.data.loader import loader
from softcache.data.open import name_of
from softcache.data.rows import layout_of_source
from softcache.data.source import Source
from softcache.dump.rows import read_keys
from softcache.errors import SettingsError

RESUME_SAMPLES = 256  # how many stored samples a resumed dump compares with the data

# the header fields that determine the stored values: a dump resumes only if all of them match
SETTINGS = (
    "data", "data_samples", "first_sample", "samples", "classes", "teachers", "temperature",
    "precision", "choice", "first_view", "views", "augment", "seed", "must_understand",
)  # fmt: skip


def check_same(
    cache: Cache,
    draft: Header,
    source: Source,
    eval_data: str | None,
    like: Path | None = None,
    ignored: Sequence[str] = (),
) -> None:
    """Raise SettingsError unless `cache` was started with the settings and the data of this dump.

    Args:
        draft: the header that this dump would write.
        like: a cache whose encoding `cache` must share.
        ignored: names in SETTINGS that are allowed to differ.
    """
    advice = "use the same, give another --out, or --overwrite to start again"
    if eval_data:
        stored_name = (cache.header.evaluation or {}).get("data")
        requested_name = name_of(eval_data)
        if stored_name != requested_name:
            raise SettingsError(
                f"{cache.path} was started with evaluation data {stored_name or 'none'}, now it is "
                f"{requested_name}; {advice}"
            )
    _check_like(cache, like, advice)
    for difference in differing_settings(cache.header, draft, ignored):
        raise SettingsError(f"{cache.path} was started with {difference}; {advice}")
    _check_samples(cache, draft, source, advice)


def differing_settings(header: Header, draft: Header, ignored: Sequence[str] = ()) -> list[str]:
    """The settings in which a cache differs from a dump that was requested, each in a phrase.

    Args:
        draft: the header that the dump would write.
        ignored: names in SETTINGS that are allowed to differ.
    """
    differences = []
    for name in [setting for setting in SETTINGS if setting not in ignored]:
        stored, requested = getattr(header, name), getattr(draft, name)
        if name == "choice":
            name = "encoding"
            stored, requested = _requested_encoding(stored), _requested_encoding(requested)
        if stored != requested:
            differences.append(_difference(name, stored, requested))
    return differences


def _check_samples(cache: Cache, draft: Header, source: Source, advice: str) -> None:
    """Compare keys and labels of up to RESUME_SAMPLES stored samples with the data."""
    if cache.layout is not None:
        _check_rows(cache, draft, source, advice)
        return
    intact = [
        cache.sample_digest(block) == digest
        for block, digest in enumerate(cache.arrays["sample_digests"])
    ]
    stored_rows = np.flatnonzero(np.repeat(intact, cache.header.block_rows)[: cache.header.samples])
    spread = np.unique(np.linspace(0, len(stored_rows) - 1, RESUME_SAMPLES).astype(np.int64))
    cache_rows = stored_rows[spread] if len(stored_rows) else stored_rows
    source_indices = (cache_rows + cache.header.first_sample).tolist()
    for batch in loader(source, [source_indices] if source_indices else [], keys=True):
        same = batch.keys.numpy().view(np.uint64) == cache.keys[cache_rows]
        same &= batch.labels.numpy() == cache.labels[cache_rows]
        if not same.all():
            first = source_indices[int(np.flatnonzero(~same)[0])]
            raise SettingsError(
                f"{cache.path} was started with other data: sample {first} of {source.name} differs; "
                f"{advice}"
            )


def _check_rows(cache: Cache, draft: Header, source: Source, advice: str) -> None:
    """Compare keys of up to RESUME_SAMPLES samples with many rows, and the layout of all, with the data."""
    header, layout = cache.header, layout_of_source(source)
    stored_facts, requested_facts = header.rows or {}, draft.rows or {}
    # the numbers of rows and tokens differ if anything else does
    counted = ("bytes", "count", "tokens")
    names = {*stored_facts, *requested_facts}
    for name in sorted(names, key=lambda name: (name in counted, name)):
        stored_fact, requested_fact = stored_facts.get(name), requested_facts.get(name)
        if stored_fact != requested_fact:
            raise SettingsError(
                f"{cache.path} was started with {name} {stored_fact!r} of its {header.unit}s, now it is "
                f"{requested_fact!r}; {advice}"
            )
    spread = np.linspace(0, header.samples - 1, min(header.samples, RESUME_SAMPLES)).astype(
        np.int64
    )
    indices = header.first_sample + spread
    differs = np.flatnonzero(read_keys(source, indices) != cache.keys[spread])
    if len(differs):
        raise SettingsError(
            f"{cache.path} was started with other data: sample {indices[differs[0]]} of {source.name} "
            f"differs; {advice}"
        )
    own = (
        layout.take(np.arange(header.sample_range.start, header.sample_range.stop))
        if layout
        else None
    )
    stored = cache.layout
    if (
        own is None
        or stored is None
        or not all(
            np.array_equal(own.arrays()[name], values) for name, values in stored.arrays().items()
        )
    ):
        raise SettingsError(
            f"{cache.path} was started with other {header.unit}s of the samples; {advice}"
        )


def _check_like(cache: Cache, like: Path | None, advice: str) -> None:
    if like is None:
        return
    model = open_cache(like)
    same_parameters = cache.header.encoding == model.header.encoding
    # shared, but not the encoding's
    data_arrays = {"class_names", "fingerprinted", "fingerprints", *OF_SAMPLES}
    fitted = {array.name for array in model.header.arrays if array.axis == "shared"} - data_arrays
    if not same_parameters or any(
        not np.array_equal(cache.arrays[name], model.arrays[name]) for name in fitted
    ):
        raise SettingsError(
            f"{cache.path} was started with another encoding than {like}'s; {advice}"
        )


def _requested_encoding(choice: dict[str, Any] | None) -> str:
    """The encoding as it was requested on the command line, from the header's `choice`."""
    choice = choice or {}
    limit = f" --max-kl {choice['max_kl']:g}" if "max_kl" in choice else ""
    return f"{choice.get('asked')}{limit}"


def _difference(name: str, stored: Any, requested: Any) -> str:  # noqa: ANN401  # header fields
    if name == "teachers" and len(stored) != len(requested):
        return f"{len(stored)} teacher(s), now {len(requested)}"
    if name == "teachers":
        changed = [
            f"{key} {old[key]!r}, now {new[key]!r}"
            for old, new in zip(stored, requested, strict=True)
            for key in new
            if old.get(key) != new[key]
        ]
        return f"another teacher ({'; '.join(changed)})"
    if name == "must_understand":
        return (
            f"{'inputs' if INPUTS in stored else 'nothing'} embedded, now "
            f"{'inputs' if INPUTS in requested else 'nothing'}"
        )
    return f"{name} {stored!r}, now it is {requested!r}"

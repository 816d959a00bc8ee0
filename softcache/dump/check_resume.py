"""Is a cache that is there, finished or begun, the one that a dump was asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache import Cache, Header, open_cache
from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.errors import SettingsError

RESUME_SAMPLES = 256  # how many samples a resumed dump compares with those it began with

# what decides the values of a cache: a dump goes on only with the same
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
    but: Sequence[str] = (),
) -> None:
    """Raise SettingsError unless `cache` was begun with the settings and the data of this dump.

    Args:
        like: a cache whose encoding it must have.
        but: settings that may differ.
    """
    advice = "use the same, give another --out, or --overwrite to start again"
    if eval_data:
        begun = (cache.header.evaluation or {}).get("data")
        wanted = open_source(eval_data).name
        if begun != wanted:
            raise SettingsError(
                f"{cache.path} was begun with evaluation data {begun or 'none'}, now they are {wanted}; "
                f"{advice}"
            )
    _check_like(cache, like, advice)
    for name in [setting for setting in SETTINGS if setting not in but]:
        begun, wanted = getattr(cache.header, name), getattr(draft, name)
        if name == "choice":
            name, begun, wanted = "encoding", _asked(begun), _asked(wanted)
        if begun != wanted:
            raise SettingsError(
                f"{cache.path} was begun with {_difference(name, begun, wanted)}; {advice}"
            )
    intact = [
        cache.sample_digest(block) == digest
        for block, digest in enumerate(cache.arrays["sample_digests"])
    ]
    present = np.flatnonzero(np.repeat(intact, cache.header.block_rows)[: cache.header.samples])
    spread = np.unique(np.linspace(0, len(present) - 1, RESUME_SAMPLES).astype(np.int64))
    at = present[spread] if len(present) else present
    places = (at + cache.header.first_sample).tolist()
    for batch in loader(source, [places] if places else [], keys=True):
        same = batch.keys.numpy().view(np.uint64) == cache.keys[at]
        same &= batch.labels.numpy() == cache.labels[at]
        if not same.all():
            first = places[int(np.flatnonzero(~same)[0])]
            raise SettingsError(
                f"{cache.path} was begun with other data: sample {first} of {source.name} differs; "
                f"{advice}"
            )


def _check_like(cache: Cache, like: Path | None, advice: str) -> None:
    if like is None:
        return
    wanted = open_cache(like)
    same = cache.header.encoding == wanted.header.encoding
    own = {"class_names", "fingerprinted", "fingerprints"}  # of its data, not of its encoding
    fitted = {array.name for array in wanted.header.arrays if array.axis == "shared"} - own
    if not same or any(
        not np.array_equal(cache.arrays[name], wanted.arrays[name]) for name in fitted
    ):
        raise SettingsError(f"{cache.path} was begun with another encoding than {like}'s; {advice}")


def _asked(choice: dict[str, Any] | None) -> str:
    """The encoding as it was asked for."""
    asked = choice or {}
    limit = f" --max-kl {asked['max_kl']:g}" if "max_kl" in asked else ""
    return f"{asked.get('asked')}{limit}"


def _difference(name: str, begun: object, wanted: object) -> str:
    if name == "teachers" and len(begun) != len(wanted):  # type: ignore[arg-type]
        return f"{len(begun)} teachers, now {len(wanted)}"  # type: ignore[arg-type]
    if name == "teachers":
        changed = [
            f"{key} {old[key]!r}, now {new[key]!r}"
            for old, new in zip(begun, wanted, strict=True)  # type: ignore[call-overload]
            for key in new
            if old.get(key) != new[key]
        ]
        return f"another teacher ({'; '.join(changed)})"
    if name == "must_understand":
        return (
            f"{'inputs' if begun else 'nothing'} embedded, now {'inputs' if wanted else 'nothing'}"
        )
    return f"{name} {begun!r}, now it is {wanted!r}"

"""Ask a teacher again about rows of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softcache.cache import Sampled, open_cache
from softcache.data.open import open_source
from softcache.dump import fidelity
from softcache.dump.config import DumpConfig
from softcache.dump.prepare import load_teachers
from softcache.errors import DataError, SettingsError
from softcache.join.fingerprints import check_replay, replayed
from softcache.join.match import join_samples
from softcache.teachers.options import COMPILED

TOLERANCE = 0.02  # of the probability mass, that other hardware or batch sizes may move


def recheck_rows(
    path: Path,
    *,
    teacher: Sequence[str],
    weights: Sequence[Path],
    data: str | None,
    rows: int,
    device: str,
    augment: str | None = None,
) -> str:
    """Compute random rows again, and say how far they are from what the cache stores.

    Raises:
        SettingsError: there is a teacher but no data, or the other way round.
        DataError: the data are not those of the cache, or its rows are not this teacher's.
    """
    if not teacher or data is None:
        raise SettingsError("--teacher and --data go together: the one is asked about the other")
    cache = open_cache(path)
    header = cache.header
    if len(teacher) != len(header.teachers):
        names = ", ".join(t["name"] for t in header.teachers)
        raise SettingsError(
            f"{len(teacher)} --teacher for a cache of {len(header.teachers)} ({names}); give them all, "
            "in this order"
        )
    config = DumpConfig(
        teacher=teacher,
        weights=weights,
        teacher_weight=[float(t["weight"]) for t in header.teachers],
        data=data,
        temperature=header.temperature,
        out=path,
        classes=header.classes,
        device=device,
        teacher_output=str(header.teachers[0].get("output", "logits")),
        precision=header.precision.removesuffix(COMPILED),
        compile=header.precision.endswith(COMPILED),
    )
    source = open_source(data)
    places = join_samples(source, cache)
    if (places[1:] < places[:-1]).any():
        raise DataError(f"{data} is in another order than {path}; give it in the order of the dump")
    if len(source) < header.data_samples:
        raise DataError(
            f"{path} is a shard of {header.data_samples:,} samples, {data} has {len(source):,}; give "
            "the whole data set"
        )
    augmentation = replayed(header, augment)
    check_replay(cache, source, augmentation, places, np.arange(len(source)))
    teachers = load_teachers(config, source, augmentation)
    found = fidelity.measure_fidelity(cache, source, teachers, augmentation, rows=rows)
    said = fidelity.fidelity_line(found, isinstance(header.encoding, Sampled))
    if not found["moved"] <= TOLERANCE:
        raise DataError(
            f"{path} is not what this teacher says: encoded again, {found['moved']:.1%} of the probability "
            f"lies elsewhere; {said}. Check teacher, weights and data against softcache info"
        )
    return said

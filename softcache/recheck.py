"""Ask a teacher again about rows of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softcache import fidelity
from softcache.cache import Sampled, open_cache
from softcache.data import open_source
from softcache.dump import DumpConfig, load_teachers
from softcache.errors import DataError, SettingsError
from softcache.join import join_samples

TOLERANCE = 1e-3  # KL in nats that other hardware or batch sizes may add


def ask_again(
    path: Path,
    *,
    teacher: Sequence[str],
    weights: Sequence[Path],
    data: str | None,
    rows: int,
    device: str,
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
    config = DumpConfig(
        teacher=teacher,
        weights=weights,
        teacher_weight=[float(t.get("weight", 1.0)) for t in header.teachers],
        data=data,
        temperature=header.temperature,
        out=path,
        classes=header.classes,
        device=device,
        precision=header.precision,
    )
    source = open_source(data)
    joined = join_samples(source, cache)
    if (joined[1:] < joined[:-1]).any():
        raise DataError(f"{data} is in another order than {path}; give it in the order of the dump")
    found = fidelity.measure(cache, source, load_teachers(config, source), rows=rows)
    said = fidelity.describe(found, isinstance(header.encoding, Sampled))
    recorded = (header.summary or {}).get("fidelity", {}).get("mean", 0.0)
    if not found["mean"] <= TOLERANCE + 10 * recorded:
        raise DataError(
            f"{path} is not what this teacher says: {said}; the dump measured {recorded:.1e}. Check "
            "teacher, weights and data against softcache info"
        )
    return said

"""Take over rows of another cache of the same dump, whose samples were others: some came or went since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache, Header, Sampled, open_cache
from softcache.cache.arrays import INPUTS
from softcache.cache.reader import partial_path
from softcache.cache.writer import Writer
from softcache.data.label_sets import stored_labels
from softcache.data.loader import loader, sequential_batches
from softcache.data.source import Source
from softcache.dump.check_resume import differing_settings
from softcache.dump.config import DumpConfig
from softcache.errors import SoftcacheError
from softcache.teachers.spec import MATRIX_KINDS, parse_teacher
from softcache.util.log import inform
from softcache.util.progress import progress

BATCH = 1000  # samples read at a time
OF_SAMPLES = ("data", "data_samples", "samples")  # settings that may differ

Indices = npt.NDArray[np.int64]


def can_reuse(cache: Cache, draft: Header, config: DumpConfig) -> bool:
    """Whether the rows of a cache, finished or not, are also those of this dump for the same samples.

    The draws of an augmentation depend on the place of a sample in the data, and so do the rows of a
    matrix: only rows of samples as they are can be taken over.
    """
    if isinstance(cache.header.encoding, Sampled) or draft.rows is not None:
        return (
            False  # its draws depend on the place too; of many rows a sample nothing is taken over
        )
    whole = all(h.first_sample == 0 and h.samples == h.data_samples for h in (cache.header, draft))
    by_content = draft.augment is None and not any(
        parse_teacher(spec).kind in MATRIX_KINDS for spec in config.teachers
    )
    return whole and by_content and not differing_settings(cache.header, draft, ignored=OF_SAMPLES)


def set_aside(config: DumpConfig, draft: Header) -> Cache | None:
    """Rename an unfinished file of `config.out` whose rows can be taken over; None if they cannot.

    Its rows are kept until those that are still needed are in the new file.
    """
    try:
        unfinished = open_cache(partial_path(config.out), unfinished=True)
    except SoftcacheError:
        return None
    if not can_reuse(unfinished, draft, config):
        return None
    partial_path(config.out).replace(aside_path(config.out))
    return open_cache(aside_path(config.out), unfinished=True)


def aside_path(out: Path) -> Path:
    """The name of an unfinished file whose rows are being taken over."""
    return out.with_name(f"{out.name}.before")


def take_over(writer: Writer, config: DumpConfig, source: Source) -> None:
    """Copy the rows that a file that was set aside has, or the cache of `config.like`."""
    caches = []
    if aside_path(config.out).exists():
        caches.append(open_cache(aside_path(config.out), unfinished=True))
    if config.like and can_reuse(open_cache(config.like), writer.header, config):
        caches.append(open_cache(config.like))
    for cache in caches:
        if writer.missing(0).any():
            copy_known_rows(cache, writer, source, config.workers)


def copy_known_rows(cache: Cache, writer: Writer, source: Source, workers: int = 0) -> None:
    """Copy the rows of all samples that a cache knows by content. Labels are those of the source."""
    known = intact_rows(cache)
    order = np.argsort(cache.keys[known], kind="stable")
    known, keys = known[order], cache.keys[known[order]]
    copied = 0
    with progress("reuse", len(source), "rows") as advance:
        arrays = [array.name for array in writer.header.arrays if array.axis == "rows"]
        for batch in loader(
            source, sequential_batches(len(source), BATCH), workers=workers, keys=True
        ):
            own, start = batch.keys.numpy().view(np.uint64), int(batch.source_indices[0])
            at = np.minimum(np.searchsorted(keys, own), max(0, len(keys) - 1))
            found = keys[at] == own if len(keys) else np.zeros(len(own), np.bool_)
            for run in runs_of(found):
                rows = known[at[run.start : run.stop]]
                labels = stored_labels(batch, writer.header)
                samples = {
                    name: values[run.start : run.stop]
                    for name, values in (labels | {"keys": own}).items()
                }
                if writer.header.embeds_inputs:
                    samples[INPUTS] = np.array(cache.arrays[INPUTS][rows])
                values = {name: np.array(cache.arrays[name][0, rows]) for name in arrays}
                writer.write(0, start + run.start, values, samples)
                copied += len(run)
            advance(len(own))
        writer.commit()
    inform(f"{copied:,} of {len(source):,} rows are taken over from {cache.path}")


def intact_rows(cache: Cache) -> Indices:
    """The cache rows whose soft targets and samples are written and undamaged."""
    intact = [
        cache.sample_digest(block) == cache.arrays["sample_digests"][block]
        and cache.block_digest(0, block) == cache.arrays["digests"][0, block]
        for block in range(cache.header.blocks)
    ]
    rows = np.repeat(intact, cache.header.block_rows)[: cache.header.samples]
    return np.flatnonzero(rows).astype(np.int64)


def runs_of(mask: npt.NDArray[np.bool_]) -> list[range]:
    """The ranges of adjacent true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]

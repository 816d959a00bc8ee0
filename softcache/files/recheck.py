"""Check rows of a cache against its teacher, which is run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softcache.cache import Sampled, open_cache
from softcache.dump import fidelity
from softcache.dump.config import DumpConfig
from softcache.dump.prepare import load_teachers
from softcache.dump.rows import text_defaults, with_rows
from softcache.errors import DataError, SettingsError
from softcache.join.fingerprints import check_replay, replayed
from softcache.join.match import join_samples
from softcache.join.samples import open_samples, token_options
from softcache.teachers.options import COMPILED, OUTPUTS

TOLERANCE = 0.02  # share of the probability that other hardware or batch sizes can move


def recheck_rows(
    path: Path,
    *,
    teacher: Sequence[str],
    weights: Sequence[Path],
    data: str | None,
    rows: int,
    device: str,
    augment: str | None = None,
    teacher_classes: str | None = None,
    trust_code: bool = False,
    same_classes: bool = False,
) -> str:
    """Compute random rows again, and measure how far the stored rows are from them.

    Args:
        path: the cache.
        teacher: the specifications of its teachers, in the order of the dump.
        weights: the weights of each teacher, or none.
        data: the specification of its samples, in the order of the dump.
        rows: how many rows to compute, at most.
        device: where to run the teacher.
        augment: all of the cache's own augmentation, if that has a callable, with the path to its file.
        teacher_classes: the classes of a wider teacher that were kept.
        trust_code: load a .pt2 teacher even if the file may run code.
        same_classes: the classes of data and teacher are the same in the same order, whatever their names.

    Returns:
        A line with the KL divergences of the rows.

    Raises:
        SettingsError: `teacher` or `data` is missing, or the number of teachers is wrong.
        DataError: the data are not the data of the cache, or its rows are not from this teacher.
    """
    if not teacher or data is None:
        raise SettingsError("--teacher and --data go together; give both, or neither")
    cache = open_cache(path)
    header = cache.header
    if len(teacher) != len(header.teachers):
        names = ", ".join(t["name"] for t in header.teachers)
        raise SettingsError(
            f"{len(teacher)} --teacher for a cache with {len(header.teachers)} ({names}); give all of them, "
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
        targets="sigmoid" if header.multi_label else "softmax",
        teacher_classes=teacher_classes,
        trust_code=trust_code,
        same_classes=same_classes,
        device=device,
        # an estimator knows its own output, and the other teachers may return logits
        teacher_output=min(
            (str(t.get("output", "logits")) for t in header.teachers), key=OUTPUTS.index
        ),
        precision=header.precision.removesuffix(COMPILED),
        compile=header.precision.endswith(COMPILED),
    )
    defaults = text_defaults(list(teacher), data, None) | token_options(header)
    source = open_samples(cache, data, same_classes=same_classes, defaults=defaults)
    source_indices = join_samples(source, cache)
    if (source_indices[1:] < source_indices[:-1]).any():
        raise DataError(f"{data} is in another order than {path}; give it in the order of the dump")
    if len(source) < header.data_samples:
        raise DataError(
            f"{path} is a shard of {header.data_samples:,} samples, {data} has {len(source):,}; give "
            "the whole data set"
        )
    augmentation = replayed(header, augment)
    check_replay(cache, source, augmentation, source_indices, np.arange(len(source)))
    teachers = load_teachers(config, source, augmentation)
    source = with_rows(source, teachers)
    measured = fidelity.measure_fidelity(cache, source, teachers, augmentation, rows=rows)
    line = fidelity.fidelity_line(measured, isinstance(header.encoding, Sampled))
    if not measured["moved"] <= TOLERANCE:
        raise DataError(
            f"{path} is not from this teacher: {measured['moved']:.1%} of the probability differs from its "
            f"rows when they are encoded again; {line}. Check teacher, weights and data against softcache "
            "info"
        )
    return line

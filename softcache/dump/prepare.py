"""Before the first row: teacher, header, encoding, and the empty file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache import Cache, Dense, Header, open_cache
from softcache.cache.allocate import create
from softcache.cache.encodings import DTYPES, ArraySpec
from softcache.cache.header import BASE_VERSION, INPUTS, VERSION
from softcache.cache.reader import partial_path
from softcache.data.augment import Augmentation, split_augment
from softcache.data.class_names import check_class_names
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.dump import select_encoding
from softcache.dump.check_resume import check_same
from softcache.dump.config import AUTO, DumpConfig
from softcache.dump.select_encoding import encoding_for_dump, encoding_of
from softcache.errors import ModelError, SettingsError, SoftcacheError
from softcache.join.fingerprints import fingerprinted_rows, reproducible_fingerprints, software
from softcache.models.evaluate import data_digest, evaluate
from softcache.teachers.batch_size import fastest_batch
from softcache.teachers.ensemble import Ensemble, make_ensemble
from softcache.teachers.load import load_teacher
from softcache.teachers.matrix import Matrix
from softcache.teachers.options import COMPILED
from softcache.util.device import pick_device
from softcache.util.log import inform
from softcache.util.tensors import to_float


def draft_header(config: DumpConfig, source: Source, teacher: Ensemble) -> Header:
    """The header but for encoding and layout, which creating the file decides."""
    select_encoding.check_spec(config.encoding, config.temperature, teacher.classes)
    total, (shard, shards) = len(source), config.shard
    if shards > total:
        raise SettingsError(f"{shards} shards of {total:,} samples; expected at most one for each")
    first, end = (part * total // shards for part in (shard, shard + 1))
    return Header(
        views=config.views,
        samples=end - first,
        first_view=config.first_view,
        first_sample=first,
        data_samples=total,
        positions=(),
        classes=teacher.classes,
        temperature=float(config.temperature),
        encoding=Dense(),
        seed=config.seed,
        augment=split_augment(config.augment).public_name,
        precision=config.precision + (COMPILED if config.compile else ""),
        data=source.name,
        choice=open_cache(config.like).header.choice
        if config.like
        else {"asked": config.encoding}
        | ({"max_kl": config.max_kl} if config.encoding == "auto" else {}),
        teachers=teacher.provenance,
        must_understand=(INPUTS,) if config.embed_inputs else (),
        version=VERSION if config.embed_inputs else BASE_VERSION,
        evaluation=None,
        software=software(),
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
    )


def check_out(out: Path) -> None:
    """Raise SettingsError now, not after hours, if a cache cannot get the name `out`."""
    if out.is_dir():
        raise SettingsError(
            f"--out {out} is a folder; name a file in it, such as {out / 'cache.h5'}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--out {out}: cannot make its folder ({error.strerror}); give another --out"
        ) from error


def load_teachers(config: DumpConfig, source: Source, augmentation: Augmentation) -> Ensemble:
    """Every teacher of the dump, loaded and tried on the first sample."""
    device = pick_device(config.device)
    raw = source.fetch([0])[0]
    first = to_float(augmentation.transformed(raw, config.first_view, np.zeros(1, np.int64)))
    weights: Sequence[Path | None] = config.weight_files or [None] * len(config.teachers)
    classes = config.classes or len(source.class_names) or None
    loaded = [
        load_teacher(
            spec,
            path,
            sample=first,
            classes=classes,
            device=device,
            precision=config.precision,
            compiled=config.compile,
            output=config.teacher_output,
            softened=config.teacher_temperature,
        )
        for spec, path in zip(config.teachers, weights, strict=True)
    ]
    for teacher in loaded:
        if isinstance(teacher.model, Matrix) and len(teacher.model.values) != len(source):
            raise ModelError(
                f"teacher {teacher.spec} has {len(teacher.model.values):,} rows, {source.name} has "
                f"{len(source):,} samples; expected a row for each sample of the data, in its order"
            )
        check_class_names(source, teacher.class_names, f"teacher {teacher.spec}")
    return make_ensemble(loaded, config.teacher_weight)


def with_batch_size(
    config: DumpConfig, source: Source, teacher: Ensemble, augmentation: Augmentation
) -> DumpConfig:
    """The settings with `auto` replaced by the batch size that is fastest here and fits."""
    if config.batch_size != AUTO:
        return config
    raw = source.fetch([0])[0]
    sample = to_float(augmentation.transformed(raw, config.first_view, np.zeros(1, np.int64)))
    size = fastest_batch(lambda inputs: teacher.log_probs(inputs, config.temperature), sample)
    inform(f"batch size: {size}")
    return replace(config, batch_size=size)


def open_unfinished(
    config: DumpConfig,
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
    finished: Cache | None = None,
) -> None:
    """Allocate the unfinished file, or check that the one that is there was begun like this.

    Args:
        finished: the same with fewer views, whose encoding and evaluation are taken over.
    """
    partial = partial_path(config.out)
    if partial.exists():
        try:
            begun = open_cache(partial, unfinished=True)
            check_same(begun, draft, source, config.eval_data, config.like)
            inform(f"going on with {partial}")
            return
        except SoftcacheError:
            if not config.overwrite:
                raise
            partial.unlink()
    like = finished or (open_cache(config.like) if config.like else None)
    if like is not None:
        header, arrays = encoding_of(draft, like)
    else:
        header, arrays = encoding_for_dump(config, draft, source, teacher, augmentation)
    known = finished.header.evaluation if finished else None
    evaluation = known or evaluate_teacher(config.eval_data, teacher, config.workers, source)
    names = source.class_names or teacher.class_names
    names = names or tuple(str(label) for label in range(teacher.classes))
    arrays["class_names"] = np.array([name.encode() for name in names])
    arrays["fingerprinted"] = chosen = fingerprinted_rows(draft.samples)
    arrays["fingerprints"] = reproducible_fingerprints(
        source,
        augmentation,
        draft.view_range,
        draft.first_sample + chosen,
    )
    inputs = input_array_spec(source) if config.embed_inputs else None
    create(config.out, replace(header, evaluation=evaluation), arrays, config.batch_size, inputs)


def input_array_spec(source: Source) -> ArraySpec:
    """What one raw sample of the source is, as the file keeps it.

    Raises:
        SettingsError: its type has no place in the format.
    """
    array = source.fetch([0])[0].numpy()
    dtype = array.dtype.newbyteorder("<").str
    if dtype not in DTYPES:
        raise SettingsError(
            f"--embed-inputs: samples of {source.name} are {array.dtype}; expected uint8 or float32, or "
            f"another of {', '.join(sorted(DTYPES))}"
        )
    return ArraySpec(INPUTS, dtype, "samples", array.shape[1:])


def evaluate_teacher(
    spec: str | None, teacher: Ensemble, workers: int, of_dump: Source
) -> dict[str, Any] | None:
    """The teacher's own errors, for the header."""
    if spec is None:
        return None
    source = open_source(spec)
    check_class_names(source, of_dump.class_names, of_dump.name)
    check_class_names(source, teacher.class_names, "the teacher")
    found = evaluate(
        lambda inputs: teacher.log_probs(inputs, 1.0),
        source,
        teacher.classes,
        teacher.device,
        workers,
    )
    inform(
        f"teacher: {found.errors:,} errors of {found.samples:,} on {source.name} "
        f"({found.accuracy:.2%})"
    )
    return {
        "data": source.name,
        "digest": data_digest(source, workers),
        "errors": found.errors,
        "samples": found.samples,
    }

"""Everything before the first row: the teacher, the header, the encoding and the empty file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache import Cache, Dense, Header, Packed, open_cache
from softcache.cache.allocate import create
from softcache.cache.array_spec import DTYPES, ArraySpec
from softcache.cache.arrays import INPUTS
from softcache.cache.encodings import LABEL_SETS, row_bytes
from softcache.cache.header import BASE_VERSION, FEATURES, PACKED_VERSION, ROWS
from softcache.cache.reader import partial_path
from softcache.data.augment import Augmentation, parse_augment, split_augment
from softcache.data.class_names import align_classes
from softcache.data.kinds import check_same_kind
from softcache.data.masks import check_masks_follow
from softcache.data.open import open_source
from softcache.data.rows import layout_of_source, unit_of, vocabulary_of
from softcache.data.source import Source, check_kind_of_labels
from softcache.data.table_columns import columns_field
from softcache.data.tables import align_columns, columns_of
from softcache.dump.check_resume import check_same
from softcache.dump.config import AUTO, DumpConfig
from softcache.dump.reuse import set_aside
from softcache.dump.rows import rows_field, sample_arrays, text_defaults, with_rows
from softcache.dump.select_encoding import check_spec, encoding_for_dump, encoding_of
from softcache.errors import DataError, SettingsError, SoftcacheError
from softcache.join.fingerprints import fingerprinted_rows, reproducible_fingerprints, software
from softcache.models.evaluate import data_digest, evaluate, judge_evaluation
from softcache.models.evaluate_rows import evaluate_rows
from softcache.teachers.batch_size import fastest_batch
from softcache.teachers.ensemble import Ensemble, make_ensemble
from softcache.teachers.load import load_teacher
from softcache.teachers.matrix import Matrix
from softcache.teachers.options import COMPILED
from softcache.teachers.server_options import server_options
from softcache.teachers.spec import parse_teacher
from softcache.teachers.teacher import Teacher
from softcache.util.device import pick_device
from softcache.util.log import inform, verdict
from softcache.util.tensors import to_float

LARGE_TOKEN = 1024  # bytes; the rows of a token that are larger are pointed out
DESCRIBED = 64  # samples of which mean and standard deviation are told


def prepare(config: DumpConfig) -> tuple[Source, Augmentation, Ensemble]:
    """The data, with the teacher's classes and rows, their augmentation, and the teacher.

    Raises:
        SoftcacheError: one of them is invalid, or they do not fit together.
    """
    source = open_source(
        config.data,
        skip_unreadable=config.skip_unreadable,
        defaults=text_defaults(config.teachers, config.data, config.loss_on),
    )
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    check_masks_follow(source, augmentation)
    teacher = load_teachers(config, source, augmentation)
    source = with_rows(source, teacher)
    source = align_classes(
        source, teacher.class_names, "the teacher", same_classes=config.same_classes
    )
    return source, augmentation, teacher


def draft_header(config: DumpConfig, source: Source, teacher: Ensemble) -> Header:
    """The header of the dump, except the encoding and the layout, which are filled in later.

    Raises:
        SettingsError: the encoding is invalid for these classes, or there are more shards than
            samples.
    """
    check_spec(config.encoding_spec, config.temperature, teacher.classes)
    check_known_classes(config, teacher.classes)
    check_kind_of_labels(source, multi_label=config.multi_label)
    if config.multi_label and layout_of_source(source) is not None:
        raise SettingsError(
            f"--targets sigmoid: each {unit_of(source)} of {source.name} has one class; leave it out"
        )
    features = [INPUTS] * config.embed_inputs + [LABEL_SETS] * config.multi_label
    features += [ROWS] * (layout_of_source(source) is not None)
    newer = [PACKED_VERSION] if config.encoding.startswith(f"{Packed.name}:") else []
    total, (shard, shards) = len(source), config.shard
    if shards > total:
        raise SettingsError(
            f"{shards} shards of {total:,} samples; expected at most one shard per sample"
        )
    first, end = (number * total // shards for number in (shard, shard + 1))
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
        else {"asked": config.encoding_spec}
        | ({"max_kl": config.max_kl} if config.encoding_spec == "auto" else {}),
        teachers=teacher.provenance,
        must_understand=tuple(features),
        version=max([BASE_VERSION, *(FEATURES[feature] for feature in features), *newer]),
        evaluation=None,
        software=software(),
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
        summary=columns_field(columns_of(source)) or None,  # room is kept for it
        rows=rows_field(source, range(first, end)),
    )


def check_known_classes(config: DumpConfig, classes: int) -> None:
    """Raise SettingsError for an encoding of more classes than a server tells of each row."""
    for text in [] if config.like is not None else config.servers:
        top = server_options(parse_teacher(text)).top
        name, _, size = config.encoding.partition(":")
        if top < classes and not (name == "topk" and int(size) <= top):
            raise SettingsError(
                f"--encoding {config.encoding}: teacher {text} tells {top:,} of {classes:,} tokens of each "
                f"row, and the others would be guessed; use --encoding topk:{top}, or a larger top="
            )


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Check that a cache can be written to `out` up front, not after hours.

    Raises:
        SettingsError: it cannot.
        FormatError: there is a file that is no cache, and `overwrite` is not set.
    """
    if out.is_dir():
        raise SettingsError(
            f"--out {out} is a folder; name a file in it, such as {out / 'cache.h5'}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--out {out}: cannot create its folder ({error.strerror}); give another --out"
        ) from error
    if out.exists() and not overwrite:
        open_cache(out)


def load_teachers(config: DumpConfig, source: Source, augmentation: Augmentation) -> Ensemble:
    """Load every teacher of the dump and run it on the first sample.

    Raises:
        SettingsError: a teacher has another number of classes than `classes`.
        ModelError: a teacher cannot be loaded or run, or a matrix does not have one row per sample.
        DataError: the classes or columns of the data and of a teacher have different names.
    """
    device = pick_device(config.device)
    raw = source.fetch([0])[0]
    first = to_float(augmentation.transformed(raw, config.first_view, np.zeros(1, np.int64)))
    weights: Sequence[Path | None] = config.weight_files or [None] * len(config.teachers)
    unit = unit_of(source)
    classes = config.classes or len(source.class_names) or vocabulary_of(source)
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
            select=config.teacher_classes,
            multi_label=config.multi_label,
            trust_code=config.trust_code,
            text=bool(getattr(source, "text", False)),
            unit=unit,
        )
        for spec, path in zip(config.teachers, weights, strict=True)
    ]
    for teacher in loaded:
        if config.classes and teacher.classes != config.classes:
            raise SettingsError(
                f"teacher {teacher.spec} has {teacher.classes} classes, and --classes is {config.classes}; "
                "leave --classes out, or choose some of the teacher's with --teacher-classes"
            )
        check_feature_names(teacher, source)
        if isinstance(teacher.model, Matrix):
            teacher.model.match(teacher.spec, source, strict=config.strict)
        align_classes(
            source,
            teacher.class_names,
            f"teacher {teacher.spec}",
            same_classes=config.same_classes,
            quiet=True,  # the caller aligns the source with all teachers
        )
    return make_ensemble(loaded, config.teacher_weight)


def check_feature_names(teacher: Teacher, source: Source) -> None:
    """Raise DataError if an estimator was fitted on other columns, or in another order, than a table has."""
    columns = tuple(getattr(source, "columns", ()))
    if columns and teacher.feature_names and columns != teacher.feature_names:
        wanted = ",".join(teacher.feature_names)
        raise DataError(
            f"teacher {teacher.spec} was fitted on the columns {wanted[:200]}, and {source.name} has "
            f"{','.join(columns)[:200]}; give the table with ?inputs={wanted[:200]}"
        )


def with_batch_size(
    config: DumpConfig, source: Source, teacher: Ensemble, augmentation: Augmentation
) -> DumpConfig:
    """The settings, with the batch size `auto` replaced by the fastest one that fits in memory."""
    if config.batch_size != AUTO:
        return config
    raw = source.fetch([0])[0]
    sample = to_float(augmentation.transformed(raw, config.first_view, np.zeros(1, np.int64)))
    size = fastest_batch(
        lambda inputs: teacher.log_probs(inputs, config.temperature), sample, len(source)
    )
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
    """Allocate the unfinished file, or check that an existing one belongs to this dump.

    If only the samples of an existing file were others, its rows of the samples that are left are kept.

    Args:
        finished: a cache of the same dump with fewer views, to reuse its encoding and evaluation.

    Raises:
        SettingsError: the existing file was started with other settings or other data.
    """
    partial, earlier = partial_path(config.out), None
    if partial.exists():
        try:
            unfinished = open_cache(partial, unfinished=True)
            check_same(unfinished, draft, source, config.eval_data, config.like)
            inform(f"resuming {partial}")
            return
        except SoftcacheError:
            if config.overwrite:
                partial.unlink()
            else:
                earlier = set_aside(config, draft)
                if earlier is None:
                    raise
    like = finished or earlier or (open_cache(config.like) if config.like else None)
    if like is not None:
        header, arrays = encoding_of(draft, like)
    else:
        header, arrays = encoding_for_dump(config, draft, source, teacher, augmentation)
    known = finished.header.evaluation if finished else None
    evaluation = known or evaluate_teacher(config, teacher, source)
    names = source.class_names or teacher.class_names
    names = names or tuple(str(label) for label in range(teacher.classes))
    arrays["class_names"] = np.array([name.encode() for name in names])
    arrays["fingerprinted"] = cache_rows = fingerprinted_rows(draft.samples)
    arrays["fingerprints"] = reproducible_fingerprints(
        source, augmentation, draft.view_range, draft.first_sample + cache_rows
    )
    arrays |= sample_arrays(source, draft.sample_range, embed=config.embed_inputs)
    embeds_samples = config.embed_inputs and draft.rows is None
    inputs = input_array_spec(source) if embeds_samples else None
    # a batch of samples with many rows fits no block, whatever its size
    batch = config.batch_size if draft.rows is None else 1
    if advice := size_advice(header, row_bytes(header.encoding, header.classes)):
        inform(advice)
    create(config.out, replace(header, evaluation=evaluation), arrays, batch, inputs)


def size_advice(header: Header, bytes_per_row: int) -> str | None:
    """What to do about tokens that take very many bytes; None if they do not."""
    if header.unit != "token" or bytes_per_row <= LARGE_TOKEN:
        return None
    return (
        f"a token takes {bytes_per_row:,} bytes; --encoding packed:36 takes 36, right on the average, but "
        f"for temperature {header.temperature:g} alone"
    )


def describe_inputs(source: Source, augmentation: Augmentation, view: int) -> str:
    """Mean and standard deviation of what the teacher gets, on a few samples, for messages."""
    samples = np.linspace(0, len(source) - 1, min(len(source), DESCRIBED)).astype(np.int64)
    raw = source.fetch(samples.tolist())[0]
    inputs = to_float(augmentation.transformed(raw, view, samples))
    if not inputs.is_floating_point():
        return f"type {inputs.dtype}"
    return f"mean {float(inputs.mean()):.3g} and standard deviation {float(inputs.std()):.3g}"


def input_array_spec(source: Source) -> ArraySpec:
    """The array that stores the raw samples of the source: its dtype and the shape of one sample.

    Raises:
        SettingsError: the format has no such dtype.
    """
    array = source.fetch([0])[0].numpy()
    dtype = array.dtype.newbyteorder("<").str
    if dtype not in DTYPES:
        raise SettingsError(
            f"--embed-inputs: samples of {source.name} are {array.dtype}, which a cache cannot store; "
            f"expected uint8, float32, or another of {', '.join(sorted(DTYPES))}"
        )
    return ArraySpec(INPUTS, dtype, "samples", array.shape[1:])


def evaluate_teacher(
    config: DumpConfig, teacher: Ensemble, dumped: Source
) -> dict[str, Any] | None:
    """Count the teacher's errors on the evaluation data, as the header records them; None without any.

    Args:
        dumped: the data of the dump, whose classes and columns the evaluation data gets.

    Raises:
        DataError: the evaluation data is of another kind than the data, or, with `strict`, the errors
            cannot be right.
    """
    if config.eval_data is None:
        return None
    defaults = text_defaults(config.teachers, config.eval_data, config.loss_on)
    source = align_columns(open_source(config.eval_data, defaults=defaults), columns_of(dumped))
    check_same_kind(dumped, source)
    names = teacher.class_names or dumped.class_names  # the data has the teacher's order already
    whose = "the teacher" if teacher.class_names else dumped.name
    source = align_classes(source, names, whose, same_classes=config.same_classes)
    workers, source = config.workers, with_rows(source, teacher)
    if layout_of_source(source) is not None:
        evaluation = evaluate_rows(
            lambda inputs, rows: teacher.row_log_probs(inputs, rows, 1.0),
            source,
            teacher.classes,
            teacher.device,
            workers,
        )
    else:
        evaluation = evaluate(
            lambda inputs: teacher.log_probs(inputs, 1.0),
            source,
            teacher.classes,
            teacher.device,
            workers,
            multi_label=config.multi_label,
        )
    if evaluation.scores is not None:
        inform(f"teacher: {evaluation.scores} on {source.name}")
    inform(
        f"teacher: {evaluation.errors:,} errors of {evaluation.samples:,} on {source.name} "
        f"({evaluation.accuracy:.2%})"
    )
    warnings = judge_evaluation(f"on {source.name}, the teacher", evaluation, names)
    if warnings and config.strict:
        raise DataError(
            f"{warnings[0]}. Nothing was written; leave --strict out to dump all the same"
        )
    for warning in warnings:
        verdict(warning)
    return {
        "data": source.name,
        "digest": data_digest(source, workers),
        "errors": evaluation.errors,
        "samples": evaluation.samples,
        **(evaluation.scores.line() if evaluation.scores else {}),
    }

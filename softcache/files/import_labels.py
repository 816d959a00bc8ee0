"""Make a cache of soft targets that already exist, in the layouts in which people store them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from softcache.cache import Cache
from softcache.data.open import open_source
from softcache.data.rows import unit_of, vocabulary_of
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import SettingsError
from softcache.teachers.spec import KINDS, MATRIX_KINDS, parse_teacher
from softcache.teachers.top_tokens import TopTokens
from softcache.util.spec import Spec


def import_labels(
    source: str,
    *,
    data: str,
    out: Path,
    teacher_output: str = "logits",
    teacher_temperature: float = 1.0,
    temperature: float | None = None,
    encoding: str | None = None,
    classes: int | None = None,
    augment: str | None = None,
    seed: int = 0,
    view: int = 0,
    embed_inputs: bool = False,
    same_classes: bool = False,
    strict: bool = True,
    overwrite: bool = False,
) -> Cache:
    """Make a cache of a matrix, or of the top classes of each row. This is a dump that runs no teacher.

    Of tokens, the documents of `source` are found in the data by their tokens, and its rows are compared with
    these tokens.

    Soft targets from elsewhere are the most likely to be in another order than the data, so that a result
    that cannot be right is an error by default.

    Args:
        source: FILE.npy, FILE.npz or FILE.pt with a matrix (samples, C); hfds:… with columns of class ids
            and log-probabilities; or FILE.jsonl, FILE.parquet or hfds:… with those of each token.
        data: the specification of the samples, in the order of the rows; of documents, in any order.
        out: the cache file to write.
        teacher_output: what the matrix holds, one of OUTPUTS.
        teacher_temperature: the temperature at which its probabilities were softened.
        temperature: the temperature of the cache; by default `teacher_temperature`.
        encoding: by default dense for a matrix, and topk with every stored entry for top classes; if the
            rows of tokens have different numbers of these, with the most that one has.
        classes: the number of classes, if neither `source` nor `data` tells it.
        augment: the augmentation that the samples had when the teacher saw them.
        seed: its seed.
        view: which of its views the teacher saw.
        embed_inputs: store the samples too, so that training needs no data.
        same_classes: the classes of `source` and `data` are the same in the same order, whatever they are
            called.
        strict: raise an error if the rows cannot belong to these samples and labels.
        overwrite: replace an existing file.

    Raises:
        SettingsError: the source is not one of these files.
        DataError: with `strict`, the rows cannot belong to these samples and labels.
        SoftcacheError: as for dump().
    """
    if view < 0:
        raise SettingsError(f"view {view}; expected 0 or more")
    spec = parse_teacher(source)
    if spec.kind not in MATRIX_KINDS:
        raise SettingsError(
            f"{source}: expected FILE.npy, FILE.npz, FILE.pt, FILE.jsonl, FILE.parquet or "
            "hfds:ID_OR_FOLDER; a model is for dump"
        )
    if encoding is None:
        encoding = "dense" if spec.kind == "matrix" else encoding_of_entries(spec, data, classes)
    return dump(
        DumpConfig(
            teacher=source,
            data=data,
            temperature=teacher_temperature if temperature is None else temperature,
            out=out,
            teacher_output=teacher_output,
            teacher_temperature=teacher_temperature,
            encoding=encoding,
            classes=classes,
            augment=augment,
            seed=seed,
            first_view=view,
            embed_inputs=embed_inputs,
            same_classes=same_classes,
            strict=strict,
            overwrite=overwrite,
        )
    )


def encoding_of_entries(spec: Spec, data: str, classes: int | None) -> str:
    """The encoding that stores every entry of the top classes or tokens of each row.

    Args:
        spec: of the rows.
        data: of the samples.
        classes: the number of classes, if it is given.

    Raises:
        SoftcacheError: the data or the rows cannot be read.
    """
    samples = open_source(data)
    classes = classes or len(samples.class_names) or vocabulary_of(samples)
    rows, _ = KINDS[spec.kind].load()(replace(spec, task=unit_of(samples)), classes)
    k = max(1, rows.file.largest) if isinstance(rows, TopTokens) else rows.values.shape[1]
    return f"topk:{k}" if k < rows.classes else "dense"

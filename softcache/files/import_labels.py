"""A cache of soft targets that somebody has already, in the layouts that people use."""

from __future__ import annotations

from pathlib import Path

from softcache.cache import Cache
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import SettingsError
from softcache.teachers.matrix import read_top_rows
from softcache.teachers.spec import MATRIX_KINDS, parse_teacher


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
    overwrite: bool = False,
) -> Cache:
    """Make a cache of a matrix, or of the top classes of each row: a dump that asks no teacher.

    Args:
        source: FILE.npy, .npz or .pt, or hfds:… with columns of ids and log-probabilities.
        teacher_output: what a matrix holds, of OUTPUTS.
        teacher_temperature: at which it was softened.
        temperature: of the cache; by default the same.
        encoding: by default dense; of top classes, as many exact entries as there are.

    Raises:
        SettingsError: the source is no such file.
        SoftcacheError: as dump().
    """
    spec = parse_teacher(source)
    if spec.kind not in MATRIX_KINDS:
        raise SettingsError(
            f"{source}: expected FILE.npy, FILE.npz, FILE.pt or hfds:ID_OR_FOLDER; a model is for dump"
        )
    if encoding is None:
        encoding = "dense"
        if spec.kind == "hfds":
            classes = classes or len(open_source(data).class_names) or None
            rows = read_top_rows(spec, classes)
            k = rows.values.shape[1]
            encoding = f"topk:{k}" if k < rows.classes else "dense"
    return dump(
        DumpConfig(
            teacher=source,
            data=data,
            temperature=temperature or teacher_temperature,
            out=out,
            teacher_output=teacher_output,
            teacher_temperature=teacher_temperature,
            encoding=encoding,
            classes=classes,
            overwrite=overwrite,
        )
    )

"""Make a cache of soft targets that already exist, in the layouts in which people store them."""

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
    augment: str | None = None,
    seed: int = 0,
    view: int = 0,
    same_classes: bool = False,
    strict: bool = True,
    overwrite: bool = False,
) -> Cache:
    """Make a cache of a matrix, or of the top classes of each row. This is a dump that runs no teacher.

    Soft targets from elsewhere are the most likely to be in another order than the data, so that a result
    that cannot be right is an error by default.

    Args:
        source: FILE.npy, FILE.npz or FILE.pt with a matrix (samples, C), or hfds:… with columns of class
            ids and log-probabilities.
        data: the specification of the samples, in the order of the rows.
        out: the cache file to write.
        teacher_output: what the matrix holds, one of OUTPUTS.
        teacher_temperature: the temperature at which its probabilities were softened.
        temperature: the temperature of the cache; by default `teacher_temperature`.
        encoding: by default dense for a matrix, and topk with every stored entry for top classes.
        classes: the number of classes, if neither `source` nor `data` tells it.
        augment: the augmentation that the samples had when the teacher saw them.
        seed: its seed.
        view: which of its views the teacher saw.
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
            f"{source}: expected FILE.npy, FILE.npz, FILE.pt or hfds:ID_OR_FOLDER; a model is for dump"
        )
    if encoding is None:
        encoding = "dense"
        if spec.kind == "hfds":
            if classes is None:
                classes = len(open_source(data).class_names) or None
            rows = read_top_rows(spec, classes)
            k = rows.values.shape[1]
            encoding = f"topk:{k}" if k < rows.classes else "dense"
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
            same_classes=same_classes,
            strict=strict,
            overwrite=overwrite,
        )
    )

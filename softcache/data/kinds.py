"""Check that evaluation data is of the same kind as the data that it evaluates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from softcache.data.source import Source
from softcache.errors import DataError

SAMPLES = 256  # at most this many samples of each source are compared
SCALE = (
    1.5  # images in [0, 1] stay below this, also after slight sharpening; those in [0, 255] do not
)


@dataclass(frozen=True)
class Kind:
    """What the first samples of a source have in common.

    Attributes:
        shapes: the different shapes of the samples.
        dtypes: their different dtypes.
        largest: the largest value of all; NaN if there is none.
        texts: whether the samples are texts, or rows of code points that may be texts.
    """

    shapes: frozenset[tuple[int, ...]]
    dtypes: frozenset[torch.dtype]
    largest: float
    texts: bool

    @property
    def numbers(self) -> set[str]:
        """What the samples hold: floats, images that `to_float` scales to 1, or other integers."""
        scaled = (torch.uint8, torch.uint16)
        return {
            "floats" if dtype.is_floating_point else "images" if dtype in scaled else "integers"
            for dtype in self.dtypes
        }


def kind_of(source: Source) -> Kind:
    """The kind of the first samples of a source, at most SAMPLES of them."""
    shapes, dtypes, largest = set(), set(), math.nan
    for index in range(min(SAMPLES, len(source))):  # one by one, since shapes may differ
        sample = source.fetch([index])[0][0]
        shapes.add(tuple(sample.shape))
        dtypes.add(sample.dtype)
        if sample.dtype.is_floating_point and sample.numel():
            value = float(sample.nan_to_num(-math.inf, math.inf, -math.inf).max())
            largest = value if math.isnan(largest) else max(largest, value)
    texts = dtypes == {torch.int64} and all(len(shape) == 1 for shape in shapes)
    return Kind(frozenset(shapes), frozenset(dtypes), largest, texts)


def check_same_kind(source: Source, eval_source: Source) -> None:
    """Raise DataError if evaluation data differs from the data in what its first samples are.

    Compared are their shape, if all samples of the data have the same one (texts may differ in length);
    whether they are floats, images of 8 or 16 bits, or other integers; and for floats, whether their
    largest value is above SCALE.

    Args:
        source: the data.
        eval_source: the evaluation data.
    """
    first, second = kind_of(source), kind_of(eval_source)
    where = f"{eval_source.name} is evaluation data of another kind than {source.name}"
    texts = first.texts and second.texts
    if len(first.shapes) == 1 and second.shapes != first.shapes and not texts:
        (shape,) = first.shapes
        other = min(second.shapes - first.shapes)
        raise DataError(
            f"{where}: its samples have shape {other}, those of the data {shape}; give both the same, "
            "such as with ?size= and ?mode= for images"
        )
    if first.numbers != second.numbers:
        raise DataError(
            f"{where}: its samples are {_names(second)}, those of the data {_names(first)}; give both the "
            "same dtype, since only uint8 and uint16 are scaled to 1"
        )
    if "floats" in first.numbers and (first.largest > SCALE) != (second.largest > SCALE):
        raise DataError(
            f"{where}: its largest value is {second.largest:g}, that of the data {first.largest:g}, in up to "
            f"{SAMPLES} samples; give both the same scale, such as 0 to 1"
        )


def _names(kind: Kind) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kind.dtypes))

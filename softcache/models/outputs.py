"""Find the logits in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logits_of(output: object) -> Tensor | object:
    """The logits of an output that names them: `.logits`, or the entry "logits" of a mapping.

    transformers returns such objects, and so do torchvision's networks with auxiliary classifiers.

    Returns:
        The tensor of logits; the output itself if it is a tensor or names no logits, such as a plain tuple,
        whose elements nothing tells apart.
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else None
    logits = getattr(output, "logits", None) if named is None else named
    return logits if isinstance(logits, Tensor) else output

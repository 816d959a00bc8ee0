"""Build a model from its specification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from softcache.errors import ModelError
from softcache.models.normalize import normalized
from softcache.models.spec import KINDS, parse_model
from softcache.util.device import is_out_of_memory


def build(
    text: str, *, input_shape: Sequence[int], classes: int, trust_code: bool = False
) -> nn.Module:
    """Build the model that a specification names, on the CPU; `softcache help specs` lists the forms.

    Args:
        input_shape: shape of one input, without the batch axis.
        classes: number of outputs of the built-in architectures, and of the last layer of `hf:` and
            `timm:` models.
        trust_code: load a .pt2 file even if it may run code.

    Raises:
        SettingsError: `text` is not a model specification, or an option in it is invalid.
        ModelError: the model cannot be built, or its inputs do not have the channels that it normalizes.
    """
    spec = replace(parse_model(text), trusted=trust_code)
    try:
        model: nn.Module = KINDS[spec.kind].load()(spec, input_shape, classes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"model {text} does not fit into memory; use a smaller one") from error
    return normalized(model, spec, input_shape)

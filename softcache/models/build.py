"""Build a model from its specification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from softcache.data.rows import TOKEN, WORD
from softcache.errors import ModelError, SettingsError
from softcache.models.language import TokenModel
from softcache.models.normalize import normalized
from softcache.models.spec import KINDS, parse_model
from softcache.util.device import is_out_of_memory
from softcache.util.spec import CODE


def build(
    text: str,
    *,
    input_shape: Sequence[int],
    classes: int,
    trust_code: bool = False,
    unit: str | None = None,
) -> nn.Module:
    """Build the model that a specification names, on the CPU; `softcache help specs` lists the forms.

    Args:
        input_shape: shape of one input, without the batch axis.
        classes: number of outputs of the built-in architectures, and of the last layer of `hf:` and
            `timm:` models.
        trust_code: load a .pt2 file even if it may run code.
        unit: what a row is, if samples have many.

    Raises:
        SettingsError: `text` is not a model specification, or an option in it is invalid.
        ModelError: the model cannot be built, or its inputs do not have the channels that it normalizes.
    """
    spec = replace(parse_model(text), trusted=trust_code, task=unit)
    if unit in (TOKEN, WORD) and spec.kind not in ("hf", CODE):
        raise SettingsError(
            f"model {text} takes no tokens; expected hf:TYPE?…, such as hf:gpt2?pretrained=false&n_layer=2, "
            "hf:ID_OR_FOLDER, or your own FILE.py:CALLABLE"
        )
    try:
        model: nn.Module = KINDS[spec.kind].load()(spec, input_shape, classes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"model {text} does not fit into memory; use a smaller one") from error
    return of_tokens(normalized(model, spec, input_shape), unit, classes)


def of_tokens(model: nn.Module, unit: str | None, classes: int | None) -> nn.Module:
    """The model as one of token ids, if the data has such; a user's own gets them without padding."""
    if unit not in (TOKEN, WORD) or isinstance(model, TokenModel):
        return model
    return TokenModel(model, classes if unit == TOKEN else None)

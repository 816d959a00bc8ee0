"""Normalization of a model's inputs, asked for in its specification: ?normalize=imagenet or ?mean=…&std=…."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ModelError
from softcache.models.hub import keep_inner_names
from softcache.models.spec import normalization
from softcache.util.spec import Spec


class Normalized(nn.Module):
    """A model that takes inputs in [0, 1] and normalizes each channel; its weights keep their names.

    Args:
        model: takes normalized inputs (B, C, ...).
        mean: mean of each channel, or one for all.
        std: standard deviation of each channel, or one for all.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values), persistent=False)  # (C,)
        keep_inner_names(self)

    def forward(self, inputs: Tensor) -> Any:  # noqa: ANN401  # whatever the model returns
        """Inputs (B, C, ...), floats in [0, 1], to the model's output."""
        if not inputs.is_floating_point():
            raise ValueError(
                f"inputs {tuple(inputs.shape)} of {inputs.dtype} cannot be normalized; expected floats"
            )
        shape = (-1, *[1] * (inputs.ndim - 2))
        return self.model((inputs - self.mean.view(shape)) / self.std.view(shape))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The model's names of its classes, in order; empty if it does not name them."""
        return tuple(getattr(self.model, "class_names", ()))


def normalized(model: nn.Module, spec: Spec, input_shape: Sequence[int]) -> nn.Module:
    """The model with the normalization that its specification asks for; the model itself if it asks for none.

    Args:
        input_shape: shape of one input, without the batch axis.

    Raises:
        ModelError: the inputs do not have as many channels as the normalization.
    """
    asked = normalization(spec.options, spec.text)
    if asked is None:
        return model
    mean, std = asked
    if len(mean) > 1 and (not input_shape or input_shape[0] != len(mean)):
        raise ModelError(
            f"model {spec.text} normalizes {len(mean)} channels, but its inputs have shape "
            f"{tuple(input_shape)}; expected {len(mean)} in front, or give a mean and a std for each channel"
        )
    return Normalized(model, mean, std)


def unnormalized(model: nn.Module) -> nn.Module:
    """The model without the normalization around it."""
    return model.model if isinstance(model, Normalized) else model

"""Models from the user's own code: FILE.py:CALLABLE and package.module:CALLABLE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from softcache.errors import ModelError
from softcache.util.callables import call_user, import_callable
from softcache.util.spec import Spec


def build_from_code(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Return the torch module that the callable returns.

    Raises:
        SettingsError: the callable cannot be imported, or raises.
        ModelError: the callable returns anything but a torch module.
    """
    model = call_code(spec)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {spec.text} returned {type(model).__name__}; expected a torch nn.Module"
        )
    return model


def call_code(spec: Spec) -> Any:  # noqa: ANN401  # whatever it returns
    """Import the callable, call it and return its result.

    Raises:
        SettingsError: the callable cannot be imported, or raises.
    """
    return call_user(import_callable(spec.text, what="model"), what=f"model {spec.text}")

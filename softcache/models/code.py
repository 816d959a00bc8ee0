"""Models of a user's own: FILE.py:CALLABLE and package.module:CALLABLE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from softcache.errors import ModelError
from softcache.util.callables import call_user, import_callable
from softcache.util.spec import Spec


def build_from_code(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The torch module that the callable returns.

    Raises:
        SettingsError: the callable cannot be imported, or raises.
        ModelError: it returns something else.
    """
    model = call_code(spec)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {spec.text} returned {type(model).__name__}; expected a torch nn.Module"
        )
    return model


def call_code(spec: Spec) -> Any:  # noqa: ANN401  # whatever it returns
    """What the callable returns."""
    return call_user(import_callable(spec.text, what="model"), what=f"model {spec.text}")

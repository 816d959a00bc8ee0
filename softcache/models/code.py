"""Models from the user's own code: FILE.py:CALLABLE and package.module:CALLABLE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from softcache.errors import ModelError, SettingsError
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
    return call_object(import_callable(_name(spec), what="model"), spec)


def call_object(make: Callable[..., Any], spec: Spec) -> Any:  # noqa: ANN401  # whatever it returns
    """Call what the specification names, and return its result.

    Raises:
        SettingsError: it raises.
    """
    return call_user(make, what=f"model {spec.text}")


def import_object(spec: Spec) -> Any:  # noqa: ANN401  # whatever has that name
    """Import what the specification names; it need not be callable.

    Raises:
        SettingsError: it cannot be imported, or there is nothing of that name.
    """
    way_in = "__getattribute__"  # a method of every module, which leads to the module itself
    try:
        method: Any = import_callable(f"{spec.place}:{way_in}", what="model")
    except SettingsError as error:
        raise type(error)(str(error).replace(way_in, spec.attribute)) from error
    module = method.__self__
    if not hasattr(module, spec.attribute):
        raise SettingsError(
            f"model {_name(spec)}: {spec.place} has no callable {spec.attribute!r}; expected "
            "FILE.py:CALLABLE or package.module:CALLABLE"
        )
    return getattr(module, spec.attribute)


def _name(spec: Spec) -> str:
    """The specification without options."""
    return f"{spec.place}:{spec.attribute}"

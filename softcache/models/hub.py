"""A model of transformers or timm behind one interface, from raw inputs to logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.util.spec import Spec


class HubModel(nn.Module):
    """A model of a library, from raw inputs to logits.

    class_names: what it calls its classes, in order; empty if it only numbers them.
    """

    def __init__(
        self, model: nn.Module, prepare: nn.Module, class_names: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.model, self.prepare, self.class_names = model, prepare, class_names
        hooks: Any = self  # torch has no types for them
        hooks.register_state_dict_post_hook(_own_names)
        hooks.register_load_state_dict_pre_hook(_wrapped_names)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (B, *shape) to logits (B, C)."""
        prepared = self.prepare(inputs)
        found = self.model(**prepared) if isinstance(prepared, Mapping) else self.model(prepared)
        return found if isinstance(found, Tensor) else found.logits


def _own_names(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Weights have the names that their library gives them: without `model.` before each."""
    inner = f"{prefix}model."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _wrapped_names(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """The way back, before they are loaded."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)


def option_value(written: str) -> Any:  # noqa: ANN401  # JSON
    """A field as JSON, or as the text that it is."""
    try:
        return json.loads(written)
    except ValueError:
        return written


@contextmanager
def library_errors(spec: Spec) -> Iterator[None]:
    """Turn whatever a library raises while it builds a model into a ModelError of one line."""
    try:
        yield
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # the libraries raise many kinds
        missing = isinstance(error, OSError) and not spec.path.expanduser().exists()
        hint = f"; there is no folder {spec.place} here" if missing else ""
        raise ModelError(
            f"model {spec.text} cannot be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}){hint}"
        ) from error

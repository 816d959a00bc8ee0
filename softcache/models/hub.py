"""A model from transformers or timm behind one interface, from raw inputs to logits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.util.spec import Spec


class HubModel(nn.Module):
    """A library's model with its preprocessing, from raw inputs to logits.

    Attributes:
        model: the library's own module.
        prepare: maps raw inputs (B, *shape) to what `model` takes.
        class_names: the model's names of its classes, in order; empty if it only numbers them.
    """

    def __init__(
        self, model: nn.Module, prepare: nn.Module, class_names: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.model, self.prepare, self.class_names = model, prepare, class_names
        keep_inner_names(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw inputs (B, *shape) to logits (B, C)."""
        prepared = self.prepare(inputs)
        output = self.model(**prepared) if isinstance(prepared, Mapping) else self.model(prepared)
        return output if isinstance(output, Tensor) else output.logits


def keep_inner_names(wrapper: Any) -> None:  # noqa: ANN401  # torch has no types for the hooks
    """Let a wrapper save and load the weights of its attribute `model` under that model's own names."""
    wrapper.register_state_dict_post_hook(_remove_prefix)
    wrapper.register_load_state_dict_pre_hook(_add_prefix)


def _remove_prefix(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Save weights under the names of the inner model, without the leading `model.`."""
    inner = f"{prefix}model."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _add_prefix(wrapper: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Undo _remove_prefix() before weights are loaded."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)


def option_value(written: str) -> Any:  # noqa: ANN401  # JSON
    """The value of an option: parsed as JSON, or the text itself if it is not JSON."""
    try:
        return json.loads(written)
    except ValueError:
        return written


def needs_own_code(error: Exception) -> bool:
    """Whether a library refused to load files because it would have to run code that lies beside them."""
    return "trust_remote_code" in str(error)


@contextmanager
def library_errors(spec: Spec) -> Iterator[None]:
    """Turn whatever a library raises while it builds a model into a ModelError of one line."""
    try:
        yield
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # the libraries raise errors of many types
        missing = isinstance(error, OSError) and not spec.path.expanduser().exists()
        hint = f"; there is no folder {spec.place} here" if missing else ""
        if needs_own_code(error):
            raise ModelError(
                f"model {spec.text} comes with code of its own, which is never run automatically; load it in "
                "a callable of yours, and name that as FILE.py:CALLABLE"
            ) from error
        raise ModelError(
            f"model {spec.text} cannot be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}){hint}"
        ) from error

"""Weights from a file; nothing in it is run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.errors import MissingModelError, ModelError
from softcache.util.messages import first_line


def load_weights(model: nn.Module, path: Path) -> None:
    """Load safetensors, or a checkpoint of tensors as torch.save writes it (weights_only).

    Raises:
        ModelError: no such file, not such a file, or its names or shapes do not fit the model.
    """
    state = read_weights(path)
    wanted = model.state_dict()
    problems = [
        *(f"{name} is missing" for name in wanted if name not in state),
        *(f"{name} is not in the model" for name in state if name not in wanted),
        *(
            f"{name} is {tuple(state[name].shape)} in the file, {tuple(wanted[name].shape)} "
            "in the model"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"weights {path} do not fit the model: {'; '.join(problems[:5])}{more}; "
            "check the model's specification against the one the weights were made with"
        )
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; nothing in it is run.

    Raises:
        ModelError: no such file, or it holds anything but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingModelError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return _plain_names(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"weights {path} cannot be read: {type(error).__name__} {first_line(error)}"
        ) from error
    except Exception as error:  # torch raises pickle's own errors for what weights_only refuses
        raise ModelError(
            f"weights {path} hold more than tensors, which is never loaded; save model.state_dict() "
            "alone, best as safetensors"
        ) from error
    for nested in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"weights {path} hold no state dict; expected tensors by name")
    return _plain_names(state)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel puts before every name."""
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of the model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

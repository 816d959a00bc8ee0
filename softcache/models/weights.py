"""Weights from a file, read without running any code in it, and hashes of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.errors import MissingModelError, ModelError
from softcache.util.messages import first_line


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights from safetensors, or from a torch.save() checkpoint with weights_only=True.

    Raises:
        ModelError: the file does not exist or cannot be read, or its names or shapes do not fit the
            model.
    """
    state = read_weights(path)
    expected = model.state_dict()
    problems = [
        *(f"{name} is missing" for name in expected if name not in state),
        *(f"{name} is not in the model" for name in state if name not in expected),
        *(
            f"{name} is {tuple(state[name].shape)} in the file, {tuple(expected[name].shape)} "
            "in the model"
            for name in expected
            if name in state and state[name].shape != expected[name].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"weights {path} do not fit the model: {'; '.join(problems[:5])}{more}; "
            "use the specification of the model that the weights were saved from"
        )
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file by name; no code in it is run.

    Raises:
        ModelError: the file does not exist, or holds anything but tensors.
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
            f"weights {path} hold more than tensors, which softcache never loads; save "
            "model.state_dict() alone, preferably as safetensors"
        ) from error
    for nested in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"weights {path} are not a state dict; expected tensors by name")
    return _plain_names(state)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix that DistributedDataParallel adds to every name."""
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parameter_count(model: nn.Module) -> int:
    """Number of scalars in all parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and values of parameters and buffers, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

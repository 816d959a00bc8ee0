"""Weights from a file, read without running any code in it, and hashes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.errors import ModelError
from softcache.models.checkpoint import State, read_checkpoint, state_dicts
from softcache.models.fit_names import COUNTER, closest, fitting, misfits
from softcache.util.log import inform
from softcache.util.messages import one_line

KEY = "?key="  # between a file and the place of the tensors in it
SHOWN = 5  # problems and names in one message


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights from safetensors, or from a torch.save() checkpoint with weights_only=True.

    `path` may end in ?key=NAME, which says where in the file the tensors are, such as ?key=ema.

    The tensors may be anywhere in the checkpoint, and under a prefix that DataParallel, torch.compile or
    Lightning adds to every name: the one mapping that fits the model is taken. Batch norm's counters may be
    missing, and floats of any width are converted to the model's.

    Raises:
        ModelError: the file does not exist or cannot be read, or its names or shapes do not fit the
            model, or several different mappings in it do.
    """
    path, key = split_key(path)
    mappings = _mappings(path)
    own = model.state_dict()  # a module's extra state need not be a tensor
    expected = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    fits = fitting(mappings, expected)
    if not fits:
        raise ModelError(_why_none_fits(path, mappings, expected))
    places = ", ".join(repr(candidate.where or "the outermost") for candidate in fits)
    if key:
        fits = [candidate for candidate in fits if _is_inside(candidate.where, key)]
        if not fits:
            raise ModelError(
                f"weights {path} have no tensors under {key!r} that fit the model; those under {places} do"
            )
    if len(fits) > 1:
        raise ModelError(
            f"weights {path} hold {len(fits)} sets of tensors that fit the model: {places}; choose one with "
            f"{path}?key={fits[-1].where or fits[0].where}"
        )
    chosen = fits[0]
    if chosen.left_out:
        inform(
            f"weights {path}: took the {len(chosen.state):,} tensors under {chosen.where} and ignored "
            f"the other {chosen.left_out:,}"
        )
    try:
        model.load_state_dict(own | _usable(chosen.state, expected))
    except Exception as error:  # a user's module may load its weights in its own way
        raise ModelError(
            f"weights {path} cannot be loaded into the model: {type(error).__name__}: {one_line(error)}"
        ) from error


def split_key(path: Path) -> tuple[Path, str]:
    """Split FILE?key=NAME into the file and the name; the name is empty if none is given."""
    file, mark, key = str(path).rpartition(KEY)
    return (path, "") if not mark or path.exists() else (Path(file), key)


def _is_inside(place: str, key: str) -> bool:
    return place == key or place.startswith(f"{key}.")


def read_weights(path: Path) -> State:
    """Read the tensors of a weights file by name; no code in it is run.

    Args:
        path: the file, and ?key=NAME if the tensors are to be those under a name in it.

    Returns:
        The largest mapping of tensors in the file.

    Raises:
        ModelError: the file does not exist, cannot be read, or holds no tensors by name.
    """
    path, key = split_key(path)
    mappings = _mappings(path)
    chosen = {place: state for place, state in mappings.items() if _is_inside(place, key)}
    return max((chosen or mappings).values(), key=len)


def _mappings(path: Path) -> dict[str, State]:
    """Every mapping from names to tensors in the file, by its place in it; at least one."""
    mappings = state_dicts(read_checkpoint(path))
    if not mappings:
        raise ModelError(f"weights {path} are not a state dict; expected tensors by name")
    return mappings


def _usable(state: State, expected: Mapping[str, Tensor]) -> State:
    """The tensors that the model has; a counter beyond the range of float16 is left as it is."""
    return {
        name: tensor
        for name, tensor in state.items()
        if name in expected
        and not (name.endswith(COUNTER) and tensor.is_floating_point() and not tensor.isfinite())
    }


def _why_none_fits(
    path: Path, mappings: Mapping[str, State], expected: Mapping[str, Tensor]
) -> str:
    """What is wrong with the mapping that comes closest, and the names that the file has instead."""
    candidate = closest(mappings, expected)
    problems = misfits(candidate.state, expected)
    stored = list(mappings[candidate.place])
    place = f" in {candidate.place!r}" if candidate.place else ""
    names = f"{', '.join(stored[:SHOWN])}{_more(stored)}" if stored else "no tensors"
    return (
        f"weights {path} do not fit the model: {'; '.join(problems[:SHOWN])}{_more(problems)}; the file has "
        f"{names}{place}; use the specification of the model that the weights were saved from"
    )


def _more(items: list[str]) -> str:
    return f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""


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

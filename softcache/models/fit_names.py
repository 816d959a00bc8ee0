"""Match the names of tensors in a file with those of a model, whatever wrapped the model before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from softcache.models.checkpoint import State

# prefixes of DataParallel, torch.compile, Lightning modules, training scripts and distillation
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "student.", "teacher.")
# names that wrappers put anywhere into a name
WRAPPERS = re.compile(
    r"(?<![^.])(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
MAX_PREFIXES = 4  # as in model.module._orig_mod.net.
COUNTER = "num_batches_tracked"  # of batch norm; not in files of old versions of torch, and not used in eval
STATISTICS = ("column_mean", "column_std")  # of Standardize; not in files of versions before 0.2
PROFILED = ("total_ops", "total_params")  # left in a model by thop, which counts operations


@dataclass(frozen=True)
class Candidate:
    """A mapping of tensors in a file, under names that may be the model's.

    Attributes:
        place: where in the file the mapping is; empty for the outermost one.
        prefix: what was removed in front of the names.
        state: the tensors by name.
        left_out: number of tensors of the same mapping that do not have the prefix.
    """

    place: str
    prefix: str
    state: State
    left_out: int = 0

    @property
    def where(self) -> str:
        """The place and the prefix, for messages."""
        return ".".join(part for part in (self.place, self.prefix.rstrip(".")) if part)


def fitting(mappings: Mapping[str, State], expected: Mapping[str, Tensor]) -> list[Candidate]:
    """The candidates that fit a model, each with the model's own names; equal ones only once.

    A prefix is removed only where the names do not fit with it.

    Args:
        mappings: what state_dicts() returns.
        expected: the model's tensors by name.
    """
    fits: list[Candidate] = []
    for place, state in mappings.items():
        for candidate in _fitting_one(place, state, expected):
            if not any(_equal(candidate.state, other.state) for other in fits):
                fits.append(candidate)
    return fits


def closest(mappings: Mapping[str, State], expected: Mapping[str, Tensor]) -> Candidate:
    """The candidate with the most names of the model: the one to explain why nothing fits."""
    candidates = [
        candidate
        for place, state in mappings.items()
        for level in _levels(Candidate(place, "", state))
        for candidate in level
    ]
    return max(candidates, key=lambda candidate: len(candidate.state.keys() & expected.keys()))


def misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps tensors from being a model's weights, each in a phrase; empty if they fit."""
    return [
        *(
            f"{name} is missing"
            for name in expected
            if name not in state and not _is_optional(name)
        ),
        *(
            f"{name} is not in the model"
            for name in state
            if name not in expected and _matters(name)
        ),
        *(
            f"{name} is {tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the model"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ),
        *(
            f"{name} is {_dtype(state[name])} in the file, {_dtype(tensor)} in the model"
            for name, tensor in expected.items()
            if name in state and tensor.is_floating_point() and not state[name].is_floating_point()
        ),
    ]


def _fitting_one(place: str, state: State, expected: Mapping[str, Tensor]) -> list[Candidate]:
    """The candidates of one mapping that fit, with as few changes of the names as are needed."""
    for level in _levels(Candidate(place, "", state)):
        fits = [candidate for candidate in level if not misfits(candidate.state, expected)]
        if fits:
            return fits
    names = {_unwrapped(name): name for name in expected}
    unwrapped = {_unwrapped(name): tensor for name, tensor in state.items()}
    renamed = (
        any(short != name for short, name in names.items()) or unwrapped.keys() != state.keys()
    )
    if not renamed or len(names) < len(expected) or len(unwrapped) < len(state):
        return []
    short = {_unwrapped(name): tensor for name, tensor in expected.items()}
    for level in _levels(Candidate(place, "", unwrapped)):
        fits = [candidate for candidate in level if not misfits(candidate.state, short)]
        if fits:
            return [
                Candidate(
                    c.place, c.prefix, {names.get(n, n): t for n, t in c.state.items()}, c.left_out
                )
                for c in fits
            ]
    return []


def _levels(candidate: Candidate) -> Iterator[list[Candidate]]:
    """The candidate, then those with one prefix less, with two, and so on."""
    level = [candidate]
    for _ in range(MAX_PREFIXES + 1):
        yield level
        level = [shorter for longer in level for shorter in _without_a_prefix(longer)]


def _without_a_prefix(candidate: Candidate) -> Iterator[Candidate]:
    first = {name.partition(".")[0] + "." for name in candidate.state}
    for prefix in sorted(first) if len(first) == 1 else [p for p in PREFIXES if p in first]:
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in candidate.state.items()
            if name.startswith(prefix)
        }
        others = len(candidate.state) - len(state)
        if state:
            yield Candidate(
                candidate.place, candidate.prefix + prefix, state, candidate.left_out + others
            )


def _unwrapped(name: str) -> str:
    return WRAPPERS.sub("", name)


def _is_optional(name: str) -> bool:
    return name.rpartition(".")[2] in (COUNTER, *STATISTICS)


def _matters(name: str) -> bool:
    return name.rpartition(".")[2] not in (*PROFILED, COUNTER)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in state.items()
    )

"""Helpers shared by the tests of encodings."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache import Basis, Encoding, Sampled, TopK
from softcache.cache.encodings import ENCODINGS
from softcache.cache.packed import Packed, packing
from softcache.dump.fit_basis import Directions, principal_directions, shared_arrays
from softcache.errors import SettingsError
from softcache.targets.decode import class_ids, decode, to_dense
from softcache.targets.encode import as_arrays, make_encoder
from softcache.targets.fetch import as_tensor
from softcache.types import Targets

Rows = npt.NDArray[np.float64]

CPU = torch.device("cpu")
EDGE = 1 << 16  # the most classes for which an id takes 16 bits

few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


# rows of every kind
def log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def divergence(log_p: Rows, log_q: Rows) -> Rows:
    """KL(p ‖ q) in nats, (B,); a class without probability adds nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        divergences: Rows = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return divergences


def every_kind(classes: int, seed: int, spread: float) -> Rows:
    """Log-probabilities (7, C), exact in float32; each row is of another kind."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal(classes).clip(-4, 4)
    order, hot = random.permutation(classes), random.integers(classes)
    is_hot = np.arange(classes) == hot
    rows = [
        noise * spread,
        np.round(noise) * spread,  # ties
        np.zeros(classes),  # uniform
        np.where(is_hot, 0.0, -1e3 + noise),  # one-hot to float32 precision
        np.where(is_hot, 0.0, -np.inf),  # one-hot
        np.where(
            order < (classes + 1) // 2, noise * spread, -np.inf
        ),  # half of the classes impossible
        np.where(is_hot, 12.0, noise),  # very peaked
    ]
    return log_softmax(np.array(rows)).astype(np.float32).astype(np.float64)


@st.composite
def batches(draw: st.DrawFn, spreads: tuple[float, ...] = (0.1, 1, 3, 10, 100, 3e4)) -> Rows:
    classes = draw(st.sampled_from([2, 3, 10, 257, 1000]))
    return every_kind(classes, draw(st.integers(0, 1 << 32)), draw(st.sampled_from(spreads)))


@st.composite
def encodings(draw: st.DrawFn, name: str, classes: int) -> Encoding:
    match name:
        case "topk":
            kept = draw(st.sets(st.sampled_from([0.5, 1.0, 2.0, 4.0, 8.0]), min_size=1))
            return TopK(draw(st.integers(1, min(classes - 1, 40))), tuple(sorted(kept)))
        case "basis":
            wide = draw(st.integers(0, min(classes - 1, 12)))
            narrow = draw(st.integers(0, min(classes - 1 - wide, 12) // 2)) * 2
            return Basis(max(wide, int(not narrow)), narrow, draw(st.integers(1, min(classes, 9))))
        case "sampled":
            return Sampled(draw(st.sampled_from([1, 2, 7, 50])))
        case "packed":
            sizes = packed_sizes(classes)
            assume(sizes)  # two or three classes never need it
            return Packed(draw(st.sampled_from(sizes)))
    return ENCODINGS[name]()


def packed_sizes(classes: int) -> list[int]:
    """The numbers of bytes up to 40 that `packed` takes for this number of classes."""

    def is_possible(size: int) -> bool:
        try:
            packing(size, classes)
        except SettingsError:
            return False
        return True

    return [size for size in range(1, 41) if is_possible(size)]


@functools.cache
def directions(rank: int, classes: int) -> Directions:
    """Directions fitted to rows that are unrelated to those that will be encoded."""
    generator = torch.Generator().manual_seed(0)
    return principal_directions(torch.randn(rank + 9, classes, generator=generator) * 3, rank)


def shared_of(encoding: Encoding, classes: int) -> dict[str, Tensor]:
    if not isinstance(encoding, Basis):
        return {}
    return shared_arrays(encoding, directions(encoding.rank, classes))


class Trip(NamedTuple):
    """A batch that was encoded, and decoded both in torch and in numpy."""

    stored: dict[str, npt.NDArray[Any]]
    targets: Targets
    torch: Rows
    numpy: Rows


def encode(
    encoding: Encoding,
    rows: Rows,
    temperature: float = 1.0,
    *,
    seed: int = 0,
    view: int = 0,
    sample_ids: npt.NDArray[np.int64] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Encode rows as the cache writer takes them."""
    shared = shared_of(encoding, rows.shape[-1])
    encoder = make_encoder(encoding, shared, temperature=temperature, seed=seed, device=CPU)
    sample_ids = np.arange(len(rows)) if sample_ids is None else sample_ids
    return as_arrays(encoder(torch.from_numpy(rows).float(), view, sample_ids))


def round_trip(
    encoding: Encoding,
    rows: Rows,
    temperature: float = 1.0,
    target_temperature: float | None = None,
) -> Trip:
    """Encode rows at `temperature` and decode them at `target_temperature`, by default the same."""
    classes = rows.shape[-1]
    target_temperature = target_temperature or temperature
    stored, shared = encode(encoding, rows, temperature), shared_of(encoding, classes)
    tensors = {name: as_tensor(values) for name, values in stored.items()}
    if "ids" in tensors:
        tensors["ids"] = class_ids(tensors["ids"], classes)
    targets = decode(
        encoding,
        tensors | {name: tensor.float() for name, tensor in shared.items()},
        temperature=temperature,
        wanted=target_temperature,
        classes=classes,
    )
    reference = encoding.decode(
        stored | {name: tensor.numpy() for name, tensor in shared.items()},
        temperature,
        target_temperature,
        classes,
    )
    assert reference.dtype == np.float32
    dense = to_dense(targets)
    assert dense.dtype == torch.float32
    return Trip(stored, targets, dense.double().numpy(), reference.astype(np.float64))


def temperatures_for(name: str) -> st.SearchStrategy[float]:
    if name in ("sampled", "packed"):
        return st.just(1.0)
    return st.sampled_from([0.5, 1.0, 3.0, 4.0, 8.0, 50.0])


def renormalised(rows: Rows, k: int, ratio: float) -> Rows:
    """Rows cut to their k largest entries; the other classes get probability 0."""
    least = np.sort(rows, -1)[:, -k][:, None]
    return log_softmax(np.where(rows >= least, rows, -np.inf) * ratio)

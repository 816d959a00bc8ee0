"""Encode log-probabilities as the file stores them, on the teacher's device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Basis, Bernoulli, Dense, Encoding, Packed, Quantized, Sampled, TopK
from softcache.cache.array_spec import id_dtype
from softcache.cache.encodings import BASIS_RANGE, FLOAT16_LOWEST, QUANTIZED_RANGE
from softcache.cache.packed import packing
from softcache.targets.draw import WIDE, largest, systematic
from softcache.targets.pack import encode_packed
from softcache.util.counter_rng import uniform

Indices = npt.NDArray[np.int64]
Stored = dict[str, Tensor]  # an encoded batch of rows: tensors by array name, on any device


class Encoder(Protocol):
    """Encodes a batch of rows."""

    def __call__(
        self, log_probs: Tensor, view: int, sample_ids: Indices, positions: Indices | None = None
    ) -> Stored:
        """The encoded rows.

        Args:
            log_probs: (B, C) float32.
            view: number of the view, from which draws follow, as from the next two.
            sample_ids: (B,) the samples of the rows.
            positions: (B,) where in their samples they stand, if these have many rows.
        """


LARGEST_ODDS = 65504.0  # the largest finite float16
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the row's largest coefficient tried as its range
SAMPLED_STREAM = 1 << 32  # random number stream, separate from those of the augmentation
PART_ELEMENTS = 1 << 19  # log-probabilities encoded at a time on a CPU: 2 MB of float32
_NARROW_LEVELS = 16  # values of a 4-bit coefficient; two share a byte


def soften(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T) of logits (B, C), in float32; Hinton et al. (arXiv 1503.02531), equation 1."""
    return torch.log_softmax(_divided(logits.float(), temperature), dim=-1)


def as_odds(logits: Tensor, temperature: float) -> Tensor:
    """z / T of logits (B, C), in float32: the log-odds of each class, if each applies or not on its own."""
    return _divided(logits.float(), temperature)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    # a copy of the logits of a large vocabulary takes as long as their softmax
    return logits if temperature == 1 else logits / temperature


def make_encoder(
    encoding: Encoding,
    shared: Mapping[str, Tensor],
    *,
    temperature: float,
    seed: int,
    device: torch.device,
) -> Encoder:
    """Make the function that encodes batches on `device`.

    Args:
        shared: the arrays that all rows share, if the encoding has any.
        temperature: the temperature of the log-probabilities to encode.
        seed: the seed of the cache, from which `sampled` draws.

    Returns:
        The encoder; as_arrays() converts its output for the cache writer.
    """
    moved = {name: tensor.to(device) for name, tensor in shared.items()}
    encode = _make_encoder(encoding, moved, temperature, seed)
    has_temporaries = not isinstance(encoding, Dense | Bernoulli)
    whole_batches = device.type != "cpu" or not has_temporaries
    return encode if whole_batches else _in_cache_sized_parts(encode)


def _in_cache_sized_parts(encode: Encoder) -> Encoder:
    """Encode a few rows at a time, so that the temporaries fit into the CPU's cache.

    With 32,000 classes, encoding whole batches takes 2 to 4 times as long.
    """

    def encode_parts(
        log_probs: Tensor, view: int, sample_ids: Indices, positions: Indices | None = None
    ) -> Stored:
        rows = max(1, PART_ELEMENTS // log_probs.shape[-1])
        if len(log_probs) <= rows:
            return encode(log_probs, view, sample_ids, positions)
        parts = [
            encode(
                log_probs[start : start + rows],
                view,
                sample_ids[start : start + rows],
                None if positions is None else positions[start : start + rows],
            )
            for start in range(0, len(log_probs), rows)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return encode_parts


def _make_encoder(
    encoding: Encoding, shared: Mapping[str, Tensor], temperature: float, seed: int
) -> Encoder:
    match encoding:
        case Dense():
            return lambda log_probs, *_: _encode_dense(log_probs)
        case Bernoulli():
            return lambda log_probs, *_: _encode_bernoulli(log_probs)
        case Quantized():
            return lambda log_probs, *_: _encode_quantized(log_probs)
        case TopK():
            ratios = [temperature / t for t in encoding.temperatures]
            return lambda log_probs, *_: _encode_topk(encoding.k, ratios, log_probs)
        case Basis():
            project = projection(shared)
            return lambda log_probs, *_: _encode_basis(encoding, shared, project, log_probs)
        case Packed():
            return lambda log_probs, view, sample_ids, positions=None: encode_packed(
                log_probs,
                torch.from_numpy(
                    uniform(seed, view, sample_ids, stream=_draw_stream(positions), draws=1)
                ).to(log_probs.device),
                packing(encoding.n, log_probs.shape[1]),
            )
        case Sampled():
            return lambda log_probs, view, sample_ids, positions=None: _encode_sampled(
                log_probs,
                uniform(seed, view, sample_ids, stream=_draw_stream(positions), draws=1),
                encoding.n,
            )
    raise TypeError(f"no encoder for {encoding}")


def _draw_stream(positions: Indices | None) -> int | Indices:
    """The stream of the draws of `sampled`: one of its own for each position in a sample."""
    return SAMPLED_STREAM if positions is None else SAMPLED_STREAM + 1 + positions


@dataclass(frozen=True)
class HostCopy:
    """An asynchronous copy of tensors to host memory, which the teacher does not wait for.

    Attributes:
        arrived: recorded when the copy is complete; None if the tensors were on the host already.
    """

    tensors: Stored
    arrived: torch.cuda.Event | None

    @staticmethod
    def of(stored: Stored) -> HostCopy:
        """Start copying; returns at once."""
        if not any(tensor.is_cuda for tensor in stored.values()):
            return HostCopy(stored, None)
        copies = {}
        for name, tensor in stored.items():
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name].copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return HostCopy(copies, arrived)

    def wait(self) -> Stored:
        """Wait until the copy is complete and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def as_arrays(stored: Stored) -> dict[str, npt.NDArray[Any]]:
    """Convert the output of an encoder for the cache writer; ids become unsigned again."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in stored.items()}
    if "ids" in arrays:
        arrays["ids"] = arrays["ids"].view(f"u{arrays['ids'].dtype.itemsize}")
    return arrays


def _encode_dense(log_probs: Tensor) -> Stored:
    return {"log_probs": _half(log_probs)}


def _encode_bernoulli(log_odds: Tensor) -> Stored:
    return {"log_odds": log_odds.clamp(-LARGEST_ODDS, LARGEST_ODDS).half()}


def _encode_quantized(log_probs: Tensor) -> Stored:
    depth = log_probs.amax(-1, keepdim=True) - log_probs  # (B, C), 0 at the largest
    depth = depth.clamp(max=QUANTIZED_RANGE)
    ranges = _half_above(depth.amax(-1, keepdim=True))
    share = depth / ranges.float()
    codes = (share.sqrt() * 255).round().clamp(max=255).to(torch.uint8)
    return {"codes": codes, "ranges": ranges}


def _encode_topk(k: int, ratios: list[float], log_probs: Tensor) -> Stored:
    head, ids = largest(log_probs, k)  # (B, k), largest first
    rest = log_probs.scatter(-1, ids, -math.inf)
    heads = [torch.logsumexp(head * ratio, -1) for ratio in ratios]
    tails = [tail - own for tail, own in zip(_log_sums(rest, ratios), heads, strict=True)]
    return {
        "ids": _short_ids(ids, log_probs.shape[-1]),
        "log_probs": _half(head),
        "tails": _half(torch.stack(tails, -1)),
    }


def _log_sums(values: Tensor, ratios: list[float]) -> list[Tensor]:
    """logsumexp(values · ratio), (B,) of each ratio, of values (B, C); powers of two are squared.

    Args:
        ratios: in falling order.
    """
    largest_value = values.amax(-1, keepdim=True).clamp(min=FLOAT16_LOWEST)
    depths = values - largest_value
    sums, powers, before = [], depths, 0.0
    for ratio in reversed(ratios):
        powers = powers.square_() if ratio == 2 * before else (depths * ratio).exp_()
        sums.append(powers.sum(-1).log() + largest_value[:, 0] * ratio)
        before = ratio
    return sums[::-1]


def projection(shared: Mapping[str, Tensor]) -> Tensor:
    """The matrix (C, r) from centred rows to coefficients: least squares on the stored directions."""
    directions = shared["directions"].double()  # (r, C), not quite orthonormal after rounding
    inverse: Tensor = torch.linalg.pinv(directions)
    return inverse.float()


def _encode_basis(
    encoding: Basis, shared: Mapping[str, Tensor], project: Tensor, log_probs: Tensor
) -> Stored:
    rows = torch.maximum(log_probs, log_probs.amax(-1, keepdim=True) - BASIS_RANGE)
    rows = rows - rows.mean(-1, keepdim=True)
    mean, directions = shared["mean"].float(), shared["directions"].float()
    scale = shared["direction_steps"]  # (r,)
    coefficients = (rows - mean) @ project / scale  # (B, r), in steps of each direction
    max_levels = torch.tensor([127.0] * encoding.wide + [7.0] * encoding.narrow, device=rows.device)
    step, levels = _best_step(coefficients, max_levels, scale)
    projected = mean + (levels * step.float() * scale) @ directions
    error = rows - projected  # (B, C)
    ids = (error.square() * log_probs.exp()).topk(encoding.top, dim=-1).indices
    rests = error.gather(-1, ids)
    rest_step = _half_above(rests.abs().amax(-1, keepdim=True) / 127)
    codes = (rests / rest_step.float()).round().clamp(-127, 127)
    wide, narrow = levels[:, : encoding.wide], (levels[:, encoding.wide :] + 8).to(torch.uint8)
    packed = narrow[:, 0::2] + narrow[:, 1::2] * _NARROW_LEVELS
    return {
        "codes": torch.cat([wide.to(torch.int8).view(torch.uint8), packed], -1),
        "steps": torch.cat([step, rest_step], -1),
        "ids": _short_ids(ids, log_probs.shape[-1]),
        "rests": codes.to(torch.int8),
    }


def _best_step(coefficients: Tensor, max_levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The step of each row, (B, 1) float16, and the levels (B, r) with the smallest error.

    Clipping the largest coefficient a little makes the step finer for all the others.
    """
    full = (coefficients.abs() / max_levels).amax(-1, keepdim=True)
    best_error = torch.full_like(full, math.inf)
    best_step, best_levels = _half_above(full), torch.zeros_like(coefficients)
    for clip in CLIPS:
        step = _half_above(full * clip)
        levels = (coefficients / step.float()).round()
        levels = torch.maximum(torch.minimum(levels, max_levels), -max_levels)
        error = ((coefficients - levels * step.float()) * scale).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_levels = torch.where(better, levels, best_levels)
    return best_step, best_levels


def _encode_sampled(log_probs: Tensor, draws: npt.NDArray[np.float64], n: int) -> Stored:
    offsets = torch.from_numpy(draws).to(log_probs.device)  # (B, 1)
    points = (offsets + torch.arange(n, device=log_probs.device)) / n  # (B, n)
    probs = log_probs.double() if log_probs.shape[1] <= WIDE else log_probs
    ids = systematic(probs.exp(), points)
    return {"ids": _short_ids(ids, log_probs.shape[-1])}


def _short_ids(ids: Tensor, classes: int) -> Tensor:
    # signed types of the same width, since torch supports few operations on unsigned ones
    return ids.to(torch.int16 if id_dtype(classes) == "<u2" else torch.int32)


def _half(values: Tensor) -> Tensor:
    """float16, with values beyond its range clamped to the largest finite ones."""
    return values.clamp(FLOAT16_LOWEST, -FLOAT16_LOWEST).half()


def _half_above(values: Tensor) -> Tensor:
    """float16, rounded up and above 0, so that a step still reaches the largest value."""
    half = values.clamp(min=1e-6, max=-FLOAT16_LOWEST).half()
    up = (half.view(torch.int16) + 1).view(torch.float16)  # the next larger number, since half > 0
    return torch.where(half.float() < values, up, half).clamp(max=-FLOAT16_LOWEST)

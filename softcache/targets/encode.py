"""Log-probabilities to what the file stores, on the device of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Basis, Dense, Encoding, Quantized, Sampled, TopK
from softcache.cache.encodings import BASIS_RANGE, FLOAT16_LOWEST, QUANTIZED_RANGE, id_dtype
from softcache.util.counter_rng import uniform

Indices = npt.NDArray[np.int64]

Stored = dict[str, Tensor]  # what the file holds of a batch of rows, by array, on any device

# log-probabilities (B, C) float32 of samples (B,) in a view, to what the file stores of them
Encoder = Callable[[Tensor, int, Indices], Stored]

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the row's largest coefficient tried as its range

SAMPLED_STREAM = 1 << 32  # of the random numbers, apart from those of augmentation

_BYTES_OF_NARROW = 16

PART_ELEMENTS = 1 << 19  # float32 of log-probabilities: 2 MB


def soften(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T) in float32, (B, C); Hinton et al. 2015 (arXiv 1503.02531), equation 1."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def make_encoder(
    encoding: Encoding,
    shared: Mapping[str, Tensor],
    *,
    temperature: float,
    seed: int,
    device: torch.device,
) -> Encoder:
    """A function that encodes on `device`; as_arrays() makes of it what the file's writer takes.

    Args:
        shared: the arrays that all rows share, if the encoding has any.
        temperature: of the log-probabilities that will come.
        seed: of the cache, for draws.
    """
    moved = {name: tensor.to(device) for name, tensor in shared.items()}
    encode = _make_encoder(encoding, moved, temperature, seed)
    at_once = device.type != "cpu" or isinstance(encoding, Dense)  # dense has no temporaries
    return encode if at_once else _in_cache_sized_parts(encode)


def _in_cache_sized_parts(encode: Encoder) -> Encoder:
    """Few rows at a time: the temporaries of many rows of many classes do not fit a CPU's cache, which
    makes encoding 2 to 4 times as slow at 32,000 classes."""

    def encode_parts(log_probs: Tensor, view: int, samples: Indices) -> Stored:
        rows = max(1, PART_ELEMENTS // log_probs.shape[-1])
        if len(log_probs) <= rows:
            return encode(log_probs, view, samples)
        parts = [
            encode(log_probs[at : at + rows], view, samples[at : at + rows])
            for at in range(0, len(log_probs), rows)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return encode_parts


def _make_encoder(
    encoding: Encoding, moved: Mapping[str, Tensor], temperature: float, seed: int
) -> Encoder:
    match encoding:
        case Dense():
            return lambda log_probs, view, samples: _encode_dense(log_probs)
        case Quantized():
            return lambda log_probs, view, samples: _encode_quantized(log_probs)
        case TopK():
            ratios = [temperature / t for t in encoding.temperatures]
            return lambda log_probs, view, samples: _encode_topk(encoding.k, ratios, log_probs)
        case Basis():
            project = projection(moved)
            return lambda log_probs, view, samples: _encode_basis(
                encoding, moved, project, log_probs
            )
        case Sampled():
            return lambda log_probs, view, samples: _encode_sampled(
                log_probs, uniform(seed, view, samples, stream=SAMPLED_STREAM, draws=1), encoding.n
            )
    raise TypeError(f"no encoder for {encoding}")


@dataclass(frozen=True)
class HostCopy:
    """Tensors on their way from the teacher's device; the device need not wait for their arrival."""

    tensors: Stored
    arrived: torch.cuda.Event | None

    @staticmethod
    def of(stored: Stored) -> HostCopy:
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
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def as_arrays(stored: Stored) -> dict[str, npt.NDArray[Any]]:
    """What an encoder gives, as the file's writer takes it; ids become unsigned again."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in stored.items()}
    if "ids" in arrays:
        arrays["ids"] = arrays["ids"].view(f"u{arrays['ids'].dtype.itemsize}")
    return arrays


def _encode_dense(log_probs: Tensor) -> Stored:
    return {"log_probs": _half(log_probs)}


def _encode_quantized(log_probs: Tensor) -> Stored:
    depth = log_probs.amax(-1, keepdim=True) - log_probs  # (B, C), 0 at the largest
    depth = depth.clamp(max=QUANTIZED_RANGE)
    ranges = _half_above(depth.amax(-1, keepdim=True))
    share = depth / ranges.float()
    codes = (share.sqrt() * 255).round().clamp(max=255).to(torch.uint8)
    return {"codes": codes, "ranges": ranges}


def _encode_topk(k: int, ratios: list[float], log_probs: Tensor) -> Stored:
    head, ids = log_probs.topk(k, dim=-1)  # (B, k), largest first
    rest = log_probs.scatter(-1, ids, -math.inf)
    tails = [
        torch.logsumexp(rest * ratio, -1) - torch.logsumexp(head * ratio, -1) for ratio in ratios
    ]
    return {
        "ids": _short_ids(ids, log_probs.shape[-1]),
        "log_probs": _half(head),
        "tails": _half(torch.stack(tails, -1)),
    }


def projection(shared: Mapping[str, Tensor]) -> Tensor:
    """(C, r), takes centred rows to coefficients: least squares on the directions as stored."""
    directions = shared["directions"].double()  # (r, C), rounded to float16: not quite orthonormal
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
    most = torch.tensor([127.0] * encoding.wide + [7.0] * encoding.narrow, device=rows.device)
    step, levels = _best_step(coefficients, most, scale)
    projected = mean + (levels * step.float() * scale) @ directions
    error = rows - projected
    ids = (error.square() * log_probs.exp()).topk(encoding.top, dim=-1).indices
    rests = error.gather(-1, ids)
    rest_step = _half_above(rests.abs().amax(-1, keepdim=True) / 127)
    codes = (rests / rest_step.float()).round().clamp(-127, 127)
    wide, narrow = levels[:, : encoding.wide], (levels[:, encoding.wide :] + 8).to(torch.uint8)
    packed = narrow[:, 0::2] + narrow[:, 1::2] * _BYTES_OF_NARROW
    return {
        "codes": torch.cat([wide.to(torch.int8).view(torch.uint8), packed], -1),
        "steps": torch.cat([step, rest_step], -1),
        "ids": _short_ids(ids, log_probs.shape[-1]),
        "rests": codes.to(torch.int8),
    }


def _best_step(coefficients: Tensor, most: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The row's step (B, 1) float16 and the levels (B, r) that err least.

    A step that clips the largest coefficient a little is finer for all the others.
    """
    full = (coefficients.abs() / most).amax(-1, keepdim=True)
    best_error = torch.full_like(full, math.inf)
    best_step, best_levels = _half_above(full), torch.zeros_like(coefficients)
    for clip in CLIPS:
        step = _half_above(full * clip)
        levels = (coefficients / step.float()).round()
        levels = torch.maximum(torch.minimum(levels, most), -most)
        error = ((coefficients - levels * step.float()) * scale).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_step = torch.where(better, step, best_step)
        best_levels = torch.where(better, levels, best_levels)
    return best_step, best_levels


def _encode_sampled(log_probs: Tensor, draws: npt.NDArray[np.float64], n: int) -> Stored:
    classes = log_probs.shape[-1]
    total = log_probs.double().exp().cumsum(-1)  # (B, C)
    offsets = torch.from_numpy(draws).to(log_probs.device)  # (B, 1)
    places = (offsets + torch.arange(n, device=log_probs.device)) / n * total[:, -1:]
    # the last draw must not round up to the total, behind which classes have probability 0
    places = torch.minimum(places, total[:, -1:] * (1 - 2**-50))
    ids = torch.searchsorted(total, places, right=True).clamp(max=classes - 1)  # (B, n)
    return {"ids": _short_ids(ids, classes)}


def _short_ids(ids: Tensor, classes: int) -> Tensor:
    # to a signed type of the same width, of which torch can do more; all bits are kept
    return ids.to(torch.int16 if id_dtype(classes) == "<u2" else torch.int32)


def _half(values: Tensor) -> Tensor:
    """float16, finite: the largest stands for anything beyond it."""
    return values.clamp(FLOAT16_LOWEST, -FLOAT16_LOWEST).half()


def _half_above(values: Tensor) -> Tensor:
    """float16, rounded up, and above 0: a step that still reaches the largest value."""
    half = values.clamp(min=1e-6, max=-FLOAT16_LOWEST).half()
    up = (half.view(torch.int16) + 1).view(torch.float16)  # the next one: half is above 0
    return torch.where(half.float() < values, up, half).clamp(max=-FLOAT16_LOWEST)

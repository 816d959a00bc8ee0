"""Decode stored rows to log-probabilities at any temperature, on the student's device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from softcache.cache import Basis, Bernoulli, Dense, Encoding, Packed, Quantized, Sampled, TopK
from softcache.cache.draws import check_sampled
from softcache.cache.packed import packing
from softcache.cache.tails import tail_weights
from softcache.errors import FormatError
from softcache.targets.pack import decode_packed
from softcache.types import SparseTargets, StoredTargets, Targets


def decode(
    encoding: Encoding,
    stored: Mapping[str, Tensor],
    *,
    temperature: float,
    wanted: float,
    classes: int,
) -> Targets:
    """Decode rows on the device of their tensors.

    Args:
        stored: arrays by name; per-row arrays have the leading axis B, and ids are int64.
        temperature: the temperature at which the rows are stored.
        wanted: the temperature of the returned targets.

    Returns:
        (B, C) float32 log-probabilities; SparseTargets for topk and sampled.

    Raises:
        SettingsError: the encoding cannot be re-tempered.
    """
    ratio = temperature / wanted
    match encoding:
        case Dense():
            return _retempered(stored["log_probs"].float(), ratio)
        case Bernoulli():
            return stored["log_odds"].float().mul_(ratio)
        case Quantized():
            depth = stored["codes"].float().div_(-255).square_() * -stored["ranges"].float()
            return _retempered(depth, ratio)
        case TopK():
            return _decode_topk(encoding, stored, ratio, wanted, classes)
        case Basis():
            return _retempered(_basis_rows(encoding, stored), ratio)
        case Packed():
            check_sampled(temperature, wanted)
            ids, log_probs = decode_packed(stored["packed"], packing(encoding.n, classes))
            nothing = torch.full_like(log_probs[:, 0], -math.inf)
            return SparseTargets(class_ids(ids, classes), log_probs, nothing, classes)
        case Sampled():
            check_sampled(temperature, wanted)
            return _decode_sampled(encoding, stored["ids"], classes)
    raise TypeError(f"no decoder for {encoding}")


def to_dense(targets: Targets | StoredTargets) -> Tensor:
    """Dense log-probabilities (B, C) float32 of targets of any kind."""
    if isinstance(targets, StoredTargets):
        targets = targets.decoded()
    if isinstance(targets, Tensor):
        return targets
    rest = targets.rest[:, None].expand(-1, targets.classes).clone()
    if not torch.isneginf(targets.log_probs).any():
        return rest.scatter(1, targets.ids, targets.log_probs)
    # ids can repeat: all but one of the copies then hold -inf
    return rest.scatter_reduce(1, targets.ids, targets.log_probs, "amax")


def _decode_topk(
    encoding: TopK,
    stored: Mapping[str, Tensor],
    ratio: float,
    target_temperature: float,
    classes: int,
) -> SparseTargets:
    low, high, share = tail_weights(encoding.temperatures, target_temperature)
    tails = stored["tails"].float()
    limit = torch.full_like(tails[:, 0], math.log((classes - encoding.k) / encoding.k))
    odds = [limit if column is None else tails[:, column] for column in (low, high)]
    tail = odds[0] * (1 - share) + odds[1] * share  # (B,), log-odds of the tail against the head
    head = torch.log_softmax(stored["log_probs"].float() * ratio, dim=-1)
    return SparseTargets(
        ids=stored["ids"],
        log_probs=head + torch.nn.functional.logsigmoid(-tail)[:, None],
        rest=torch.nn.functional.logsigmoid(tail) - math.log(classes - encoding.k),
        classes=classes,
    )


def _basis_rows(encoding: Basis, stored: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities up to a constant per row, (B, C) float32."""
    codes, steps = stored["codes"], stored["steps"].float()
    wide = codes[:, : encoding.wide].view(torch.int8).float()
    packed = codes[:, encoding.wide :]
    narrow = torch.stack([packed & 15, packed >> 4], -1).flatten(1).float() - 8
    levels = torch.cat([wide, narrow], -1)  # (B, r)
    coefficients = levels * steps[:, :1] * stored["direction_steps"]
    rows = torch.addmm(stored["mean"].float(), coefficients, stored["directions"].float())
    return rows.scatter_add_(1, stored["ids"], stored["rests"].float() * steps[:, 1:])


def _decode_sampled(encoding: Sampled, ids: Tensor, classes: int) -> SparseTargets:
    """Count how often each class was drawn; the first of its repeated ids holds the whole count."""
    ids = ids.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)  # (B, n)
    log_probs = torch.where(first, (counts / encoding.n).log(), -math.inf)
    rest = torch.full_like(log_probs[:, 0], -math.inf)
    return SparseTargets(ids=ids, log_probs=log_probs, rest=rest, classes=classes)


def class_ids(ids: Tensor, classes: int) -> Tensor:
    """Convert stored class ids to int64, and check their range, since they index memory.

    Stored ids are unsigned; as_tensor() passes them on as signed tensors of the same width.

    Raises:
        FormatError: an id is not below `classes`.
    """
    if ids.dtype != torch.int64:
        ids = ids.long() & (0xFFFF if ids.dtype == torch.int16 else 0xFFFFFFFF)
    if ids.numel() and int(ids.max()) >= classes:
        raise FormatError(
            f"the cache stores class id {int(ids.max())}; expected 0 to {classes - 1}: the file is "
            "damaged or forged, get it again"
        )
    return ids


def _retempered(rows: Tensor, ratio: float) -> Tensor:
    """log softmax(rows · ratio), (B, C); overwrites `rows` to avoid another copy of that size."""
    return torch.log_softmax(rows if ratio == 1 else rows.mul_(ratio), dim=-1)

"""What the file stores to log-probabilities at any temperature, on the device of the student."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from softcache.cache import Basis, Dense, Encoding, Quantized, Sampled, TopK
from softcache.cache.encodings import check_sampled, tail_weights
from softcache.errors import FormatError
from softcache.types import SparseTargets, Targets


def decode(
    encoding: Encoding,
    stored: Mapping[str, Tensor],
    *,
    temperature: float,
    wanted: float,
    classes: int,
) -> Targets:
    """Targets at temperature `wanted` of rows stored at `temperature`, on the tensors' device.

    Args:
        stored: arrays by name, those of rows with B in front; ids as int64.

    Returns:
        (B, C) float32 for dense encodings, SparseTargets for topk and sampled.
    """
    ratio = temperature / wanted
    match encoding:
        case Dense():
            return _retempered(stored["log_probs"].float(), ratio)
        case Quantized():
            depth = stored["codes"].float().div_(-255).square_() * -stored["ranges"].float()
            return _retempered(depth, ratio)
        case TopK():
            return _decode_topk(encoding, stored, ratio, wanted, classes)
        case Basis():
            return _retempered(_basis_rows(encoding, stored), ratio)
        case Sampled():
            check_sampled(temperature, wanted)
            return _decode_sampled(encoding, stored["ids"], classes)
    raise TypeError(f"no decoder for {encoding}")


def to_dense(targets: Targets) -> Tensor:
    """Log-probabilities (B, C) of targets that may be sparse."""
    if isinstance(targets, Tensor):
        return targets
    rest = targets.rest[:, None].expand(-1, targets.classes).clone()
    if not torch.isneginf(targets.log_probs).any():
        return rest.scatter(1, targets.ids, targets.log_probs)
    # repeated ids: all but one of them hold -inf
    return rest.scatter_reduce(1, targets.ids, targets.log_probs, "amax")


def _decode_topk(
    encoding: TopK, stored: Mapping[str, Tensor], ratio: float, wanted: float, classes: int
) -> SparseTargets:
    low, high, share = tail_weights(encoding.temperatures, wanted)
    tails = stored["tails"].float()
    limit = torch.full_like(tails[:, 0], math.log((classes - encoding.k) / encoding.k))
    odds = [limit if at is None else tails[:, at] for at in (low, high)]
    tail = odds[0] * (1 - share) + odds[1] * share  # (B,) log tail - log head
    head = torch.log_softmax(stored["log_probs"].float() * ratio, dim=-1)
    return SparseTargets(
        ids=stored["ids"],
        log_probs=head + torch.nn.functional.logsigmoid(-tail)[:, None],
        rest=torch.nn.functional.logsigmoid(tail) - math.log(classes - encoding.k),
        classes=classes,
    )


def _basis_rows(encoding: Basis, stored: Mapping[str, Tensor]) -> Tensor:
    """The rows up to a constant each, (B, C) float32."""
    codes, steps = stored["codes"], stored["steps"].float()
    wide = codes[:, : encoding.wide].view(torch.int8).float()
    packed = codes[:, encoding.wide :]
    narrow = torch.stack([packed & 15, packed >> 4], -1).flatten(1).float() - 8
    levels = torch.cat([wide, narrow], -1)  # (B, r)
    coefficients = levels * steps[:, :1] * stored["direction_steps"]
    rows = torch.addmm(stored["mean"].float(), coefficients, stored["directions"].float())
    return rows.scatter_add_(1, stored["ids"], stored["rests"].float() * steps[:, 1:])


def _decode_sampled(encoding: Sampled, ids: Tensor, classes: int) -> SparseTargets:
    """Systematic draws come in ascending order: equal ids are neighbours; the first counts all."""
    ids = ids.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)  # (B, n)
    log_probs = torch.where(first, (counts / encoding.n).log(), -math.inf)
    rest = torch.full_like(log_probs[:, 0], -math.inf)
    return SparseTargets(ids=ids, log_probs=log_probs, rest=rest, classes=classes)


def class_ids(ids: Tensor, classes: int) -> Tensor:
    """Ids as stored, whose sign bit is a plain bit, as int64; checked, for they index memory."""
    if ids.dtype != torch.int64:
        ids = ids.long() & (0xFFFF if ids.dtype == torch.int16 else 0xFFFFFFFF)
    if ids.numel() and int(ids.max()) >= classes:
        raise FormatError(
            f"the cache stores class id {int(ids.max())}; expected 0 to {classes - 1}: the file is "
            "damaged or forged, get it again"
        )
    return ids


def _retempered(rows: Tensor, ratio: float) -> Tensor:
    """log softmax(rows · ratio); `rows` is scratch, and no further copy of its size is made."""
    return torch.log_softmax(rows if ratio == 1 else rows.mul_(ratio), dim=-1)

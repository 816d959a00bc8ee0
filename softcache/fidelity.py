"""How far what is stored is from what the teacher says: KL on rows drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Sampled
from softcache.data import Source, loader, to_float
from softcache.loss import SparseTargets, Targets
from softcache.progress import progress
from softcache.targets import soft_targets, to_dense
from softcache.teacher import Ensemble
from softcache.views import augment, parse_augment

ROWS = 1024
BATCH = 256
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # at which stored rows are tried, besides their own
VALUES = 1 << 27  # how many log-probabilities are held at once, at the most

Pairs = npt.NDArray[np.int64]  # (n, 2) view and sample


def draw_rows(views: int, samples: int, count: int, seed: int) -> Pairs:
    """`count` rows of all views at random, without repeats; by view, then sample."""
    total = views * samples
    random = np.random.default_rng(seed)
    if total < 1 << 24:
        rows = random.choice(total, min(count, total), replace=False)
    else:
        rows = np.unique(random.integers(0, total, count))
    return np.stack(np.divmod(np.sort(rows), samples), -1)


def teacher_rows(
    teachers: Ensemble,
    source: Source,
    pairs: Pairs,
    *,
    temperature: float,
    augmentation: str | None,
    seed: int,
    workers: int = 0,
) -> Tensor:
    """What the teacher says of the rows in `pairs`: log-probabilities (n, C) on its device."""
    ops, found = parse_augment(augmentation), []
    batches = [
        (int(view), pairs[pairs[:, 0] == view, 1][at : at + BATCH].tolist())
        for view in np.unique(pairs[:, 0])
        for at in range(0, int((pairs[:, 0] == view).sum()), BATCH)
    ]
    order = [indices for _, indices in batches]
    with progress("try rows", len(pairs), "rows") as advance:
        for (view, _), batch in zip(batches, loader(source, order, workers=workers), strict=True):
            samples = batch.indices.numpy()
            inputs = to_float(batch.inputs.to(teachers.device))
            inputs = augment(inputs, ops, seed=seed, view=view, samples=samples)
            found.append(teachers.log_probs(inputs, temperature, samples))
            advance(len(samples))
    return torch.cat(found)


def divergence(log_probs: Tensor, targets: Targets) -> Tensor:
    """KL(teacher ‖ stored) of each row, (B,), in nats; log_probs (B, C) are the teacher's.

    Of draws it is KL(stored ‖ teacher), since classes that were not drawn have probability 0.
    """
    stored = to_dense(targets)
    if isinstance(targets, SparseTargets) and bool(torch.isneginf(targets.rest).any()):
        log_probs, stored = stored, log_probs
    difference = (log_probs - stored).masked_fill(torch.isneginf(log_probs), 0)
    return (log_probs.exp() * difference).sum(-1)


def retemper(log_probs: Tensor, temperature: float, wanted: float) -> Tensor:
    """log p at `wanted` from log p at `temperature`, (B, C)."""
    return torch.log_softmax(log_probs * (temperature / wanted), dim=-1)


def temperatures_of(cache_temperature: float, sampled: bool) -> list[float]:
    """The cache's own temperature first, then others at which students may use it."""
    return [cache_temperature] + [t for t in TEMPERATURES if t != cache_temperature and not sampled]


def measure(
    cache: Cache, source: Source, teachers: Ensemble, *, rows: int = ROWS, workers: int = 0
) -> dict[str, Any]:
    """KL of stored rows against the teacher, asked again: mean, 99th percentile, worst.

    Returns:
        rows, mean, p99, worst: at the cache's temperature, in nats; at: the mean by temperature.
    """
    header = cache.header
    rows = max(1, min(rows, VALUES // header.classes))
    pairs = draw_rows(header.views, header.samples, rows, header.seed)
    said = teacher_rows(
        teachers,
        source,
        pairs,
        temperature=header.temperature,
        augmentation=header.augment,
        seed=header.seed,
        workers=workers,
    )
    means = {}
    own = np.zeros(0)
    sampled = isinstance(header.encoding, Sampled)
    for wanted in temperatures_of(header.temperature, sampled):
        kl = _stored_divergence(cache, pairs, said, wanted)
        means[f"{wanted:g}"] = float(kl.mean())
        own = kl if wanted == header.temperature else own
    return {
        "rows": len(pairs),
        "mean": float(own.mean()),
        "p99": float(np.quantile(own, 0.99)),
        "worst": float(own.max()),
        "at": means,
    }


def _stored_divergence(
    cache: Cache, pairs: Pairs, said: Tensor, wanted: float
) -> npt.NDArray[np.float64]:
    fetch = soft_targets(cache, wanted, said.device)
    found, done = [], 0
    for view in np.unique(pairs[:, 0]):
        samples = pairs[pairs[:, 0] == view, 1]
        for at in range(0, len(samples), BATCH):
            part = samples[at : at + BATCH]
            true = retemper(said[done : done + len(part)], cache.header.temperature, wanted)
            found.append(divergence(true, fetch(int(view), part)).double().cpu().numpy())
            done += len(part)
    return np.concatenate(found)


def describe(fidelity: dict[str, Any], sampled: bool) -> str:
    """One line for people."""
    others = ", ".join(f"T={t} {kl:.1e}" for t, kl in fidelity["at"].items())
    direction = "KL(stored ‖ teacher)" if sampled else "KL(teacher ‖ stored)"
    return (
        f"fidelity: {direction} mean {fidelity['mean']:.1e}, 99th percentile "
        f"{fidelity['p99']:.1e}, worst {fidelity['worst']:.1e} nats on {fidelity['rows']:,} rows; "
        f"mean at {others}"
    )

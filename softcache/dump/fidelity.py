"""How far what is stored is from what the teacher says: KL on rows drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Sampled
from softcache.data.augment import Augmentation
from softcache.data.loader import augmented, loader, make_request
from softcache.data.source import Source
from softcache.targets.decode import class_ids, decode, to_dense
from softcache.targets.encode import make_encoder
from softcache.targets.fetch import shared_tensors, soft_targets
from softcache.teachers.ensemble import Ensemble
from softcache.types import SparseTargets, Targets
from softcache.util.progress import progress

ROWS = 1024

PRECISION_ROWS = 256

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
    augmentation: Augmentation,
    workers: int = 0,
) -> Tensor:
    """What the teacher says of the rows in `pairs`: log-probabilities (n, C) on its device."""
    found = []
    requests = [
        make_request(augmentation, part.tolist(), view, part) for view, part in _parts(pairs)
    ]
    batches = loader(source, requests, augmentation=augmentation, workers=workers)
    with progress("try rows", len(pairs), "rows") as advance:
        for request, batch in zip(requests, batches, strict=True):
            samples = batch.source_indices.numpy()
            inputs = augmented(batch, augmentation, request.view, samples, teachers.device)
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


def measure_fidelity(
    cache: Cache,
    source: Source,
    teachers: Ensemble,
    augmentation: Augmentation,
    *,
    rows: int = ROWS,
    workers: int = 0,
) -> dict[str, Any]:
    """KL of stored rows against the teacher, asked again: mean, 99th percentile, worst.

    Returns:
        rows, mean, p99, worst: at the cache's temperature, in nats; at: the mean by temperature;
        precision: KL(float32 ‖ as asked) at the temperature, if the teacher ran in another;
        moved: the share of probability that lies elsewhere when the rows are encoded again.
    """
    header = cache.header
    rows = max(1, min(rows, VALUES // header.classes))
    pairs = draw_rows(header.views, header.samples, rows, header.seed)
    said = teacher_rows(
        teachers,
        source,
        pairs + np.array([header.first_view, header.first_sample]),
        temperature=header.temperature,
        augmentation=augmentation,
        workers=workers,
    )
    means = {}
    own = np.zeros(0)
    sampled = isinstance(header.encoding, Sampled)
    for wanted in temperatures_of(header.temperature, sampled):
        kl = _stored_divergence(cache, pairs, said, wanted)
        means[f"{wanted:g}"] = float(kl.mean())
        own = kl if wanted == header.temperature else own
    exact = teachers.in_float32
    cost = {}
    if exact is not None:
        few = pairs[:: max(1, len(pairs) // PRECISION_ROWS)]
        numbers = few + np.array([header.first_view, header.first_sample])
        full, low = (
            teacher_rows(
                one, source, numbers, temperature=header.temperature, augmentation=augmentation
            )
            for one in (exact, teachers)
        )
        cost = {"precision": float(divergence(full, low).mean())}
    return cost | {
        "rows": len(pairs),
        "mean": float(own.mean()),
        "p99": float(np.quantile(own, 0.99)),
        "worst": float(own.max()),
        "at": means,
        "moved": _moved(cache, pairs, said),
    }


def _stored_divergence(
    cache: Cache, pairs: Pairs, said: Tensor, wanted: float
) -> npt.NDArray[np.float64]:
    fetch = soft_targets(cache, wanted, said.device)
    found, done = [], 0
    for view, part in _parts(pairs):
        true = retemper(said[done : done + len(part)], cache.header.temperature, wanted)
        found.append(divergence(true, fetch(view, part)).double().cpu().numpy())
        done += len(part)
    return np.concatenate(found)


def _moved(cache: Cache, pairs: Pairs, said: Tensor) -> float:
    """Mean total variation between stored rows and the same rows encoded again."""
    header = cache.header
    shared = shared_tensors(cache)
    encode = make_encoder(
        header.encoding,
        shared,
        temperature=header.temperature,
        seed=header.seed,
        device=said.device,
    )
    fetch = soft_targets(cache, header.temperature, said.device)
    total, done = 0.0, 0
    for view, part in _parts(pairs):
        stored = encode(
            said[done : done + len(part)], header.first_view + view, header.first_sample + part
        )
        if "ids" in stored:
            stored["ids"] = class_ids(stored["ids"], header.classes)
        again = decode(
            header.encoding,
            stored | {name: tensor.to(said.device) for name, tensor in shared.items()},
            temperature=header.temperature,
            wanted=header.temperature,
            classes=header.classes,
        )
        difference = to_dense(again).exp() - to_dense(fetch(view, part)).exp()
        total += float(difference.abs().sum()) / 2
        done += len(part)
    return total / len(pairs)


def _parts(pairs: Pairs) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Views, each with at most BATCH of its samples at a time."""
    for view in map(int, np.unique(pairs[:, 0])):
        samples = pairs[pairs[:, 0] == view, 1]
        for part in np.split(samples, range(BATCH, len(samples), BATCH)):
            yield view, part


def fidelity_line(fidelity: dict[str, Any], sampled: bool) -> str:
    """One line for people."""
    others = ", ".join(f"T={t} {kl:.1e}" for t, kl in fidelity["at"].items())
    cost = fidelity.get("precision")
    against = "" if cost is None else f"; the precision cost KL(float32 ‖ teacher) {cost:.1e}"
    direction = "KL(stored ‖ teacher)" if sampled else "KL(teacher ‖ stored)"
    return (
        f"fidelity: {direction} mean {fidelity['mean']:.1e}, 99th percentile "
        f"{fidelity['p99']:.1e}, worst {fidelity['worst']:.1e} nats on {fidelity['rows']:,} rows; "
        f"mean at {others}{against}"
    )

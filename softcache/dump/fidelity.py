"""How far the stored rows are from the teacher's: KL divergence on randomly drawn rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.cache import Cache, Header, Sampled, TopK
from softcache.cache.layout import RowLayout
from softcache.data.augment import Augmentation
from softcache.data.loader import augmented, loader, make_request
from softcache.data.rows import layout_of_source
from softcache.data.source import Source
from softcache.divergences import bernoulli
from softcache.targets.decode import class_ids, decode, to_dense
from softcache.targets.encode import make_encoder
from softcache.targets.fetch import shared_tensors, soft_targets
from softcache.teachers.ensemble import Ensemble
from softcache.types import RowIndex, SparseTargets, Targets
from softcache.util.progress import progress

ROWS = 1024  # drawn to measure a cache
PRECISION_ROWS = 256  # of these, computed again in float32
BATCH = 256
BATCH_VALUES = 1 << 22  # log-probabilities of a batch, where a row has very many
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # at which stored rows are measured, besides the cache's own
VALUES = 1 << 27  # the most log-probabilities held in memory at once
VALUES_OF_ROWS = (
    1 << 25
)  # the same where samples have many rows, of which there is memory for a part
SAMPLES = 128  # of which rows are drawn where samples have many
SAMPLES_AT_ONCE = 16
REPEATED_SAMPLES = 16  # of those, that a server is asked about once more
MOST_OF_THE_MASS = 0.95  # of a token; where less is stored, the gradient is another one
MOST_REPEATS_KL = 1e-3  # nats; above, the answers of a server are not those of one model

Pairs = npt.NDArray[np.int64]  # (n, 2): view, and cache row or sample id


def draw_rows(views: int, samples: int, count: int, seed: int) -> Pairs:
    """Draw about `count` distinct rows at random from all views.

    Returns:
        (n, 2) int64, view and sample, both counted from 0 and sorted by view, then sample. Of many
        rows, duplicates are dropped rather than redrawn, so n can be slightly below `count`.
    """
    total = views * samples
    random = np.random.default_rng(seed)
    if total < 1 << 24:
        rows = random.choice(total, min(count, total), replace=False)
    else:
        rows = np.unique(random.integers(0, total, count))
    return np.stack(np.divmod(np.sort(rows), samples), -1)


def draw_rows_of_samples(
    layout: RowLayout, views: int, samples: range, count: int, seed: int
) -> Pairs:
    """Draw about `count` rows of samples that have many, some of each of up to SAMPLES of them.

    The teacher has to run on a whole sample for any of its rows.

    Args:
        layout: of the whole data set.
        samples: those to draw from.

    Returns:
        (n, 2) int64, view and row, both counted from 0, sorted; rows are those of the data set.
    """
    random = np.random.default_rng(seed)
    with_rows = np.arange(samples.start, samples.stop)
    with_rows = with_rows[layout.counts(with_rows) > 0]
    drawn = np.sort(random.choice(with_rows, min(SAMPLES, len(with_rows)), replace=False))
    each = max(1, count // len(drawn))
    pairs = []
    for sample, view in zip(drawn, random.integers(0, views, len(drawn)), strict=True):
        rows = np.arange(layout.offsets[sample], layout.offsets[sample + 1])
        kept = np.sort(random.choice(rows, min(each, len(rows)), replace=False))
        pairs.append(np.stack([np.full(len(kept), view), kept], -1))
    joined = np.concatenate(pairs)[:count]
    return joined[np.lexsort((joined[:, 1], joined[:, 0]))]


def _rows_of_samples(
    teachers: Ensemble,
    source: Source,
    layout: RowLayout,
    pairs: Pairs,
    *,
    temperature: float,
    augmentation: Augmentation,
    workers: int,
) -> Tensor:
    """The same as teacher_rows() for samples that have many rows; pairs (n, 2) hold view and row."""
    samples = layout.samples_of(pairs[:, 1])
    groups: list[tuple[int, Pairs]] = []  # of each batch: its view, and its pairs of sample and row
    for view in map(int, np.unique(pairs[:, 0])):
        of_view = np.stack([samples, pairs[:, 1]], -1)[pairs[:, 0] == view]
        distinct = np.unique(of_view[:, 0])
        for part in np.split(distinct, range(SAMPLES_AT_ONCE, len(distinct), SAMPLES_AT_ONCE)):
            groups.append((view, of_view[np.isin(of_view[:, 0], part)]))
    requests = [
        make_request(augmentation, (ids := np.unique(group[:, 0])).tolist(), view, ids)
        for view, group in groups
    ]
    batches = loader(source, requests, augmentation=augmentation, workers=workers)
    outputs: list[Tensor] = []
    with progress("try rows", len(pairs), "rows") as advance:
        for (view, group), batch in zip(groups, batches, strict=True):
            ids = batch.source_indices.numpy()
            inputs = augmented(batch, augmentation, view, ids, teachers.device)
            wanted = RowIndex(
                torch.from_numpy(np.searchsorted(ids, group[:, 0])),
                torch.from_numpy(layout.positions_of(group[:, 1])),
            )
            outputs += teachers.row_log_probs(inputs, wanted, temperature, ids)
            advance(len(group))
    return torch.cat(outputs)


def teacher_rows(
    teachers: Ensemble,
    source: Source,
    pairs: Pairs,
    *,
    temperature: float,
    augmentation: Augmentation,
    workers: int = 0,
) -> Tensor:
    """Run the teacher on the rows in `pairs`.

    Args:
        pairs: (n, 2), view and sample id; or view and row, where samples have many.

    Returns:
        (n, C) float32 log-probabilities at `temperature`, on the teacher's device.
    """
    layout = layout_of_source(source)
    if layout is not None:
        return _rows_of_samples(
            teachers,
            source,
            layout,
            pairs,
            temperature=temperature,
            augmentation=augmentation,
            workers=workers,
        )
    outputs = []
    requests = [
        make_request(augmentation, sample_ids.tolist(), view, sample_ids)
        for view, sample_ids in _batches(pairs)
    ]
    batches = loader(source, requests, augmentation=augmentation, workers=workers)
    with progress("try rows", len(pairs), "rows") as advance:
        for request, batch in zip(requests, batches, strict=True):
            sample_ids = batch.source_indices.numpy()  # of a dump, these are the same
            inputs = augmented(batch, augmentation, request.view, sample_ids, teachers.device)
            outputs.append(teachers.log_probs(inputs, temperature, sample_ids))
            advance(len(sample_ids))
    return torch.cat(outputs)


def divergence(log_probs: Tensor, targets: Targets, *, multi_label: bool = False) -> Tensor:
    """KL(teacher ‖ stored) of each row, in nats.

    For sampled targets it is KL(stored ‖ teacher), since classes that were not drawn have
    probability 0.

    Args:
        log_probs: (B, C), the teacher's.
        targets: the stored rows, at the same temperature.
        multi_label: whether both are log-odds of classes that apply or not on their own.

    Returns:
        (B,)
    """
    stored = to_dense(targets)
    if multi_label:
        return bernoulli(stored, log_probs)
    if isinstance(targets, SparseTargets) and bool(torch.isneginf(targets.rest).any()):
        log_probs, stored = stored, log_probs
    difference = (log_probs - stored).masked_fill(torch.isneginf(log_probs), 0)
    return (log_probs.exp() * difference).sum(-1)


def retemper(
    log_probs: Tensor, temperature: float, target_temperature: float, *, multi_label: bool = False
) -> Tensor:
    """Log-probabilities (B, C) at `target_temperature`, from those at `temperature`; or log-odds."""
    if multi_label:
        return log_probs * (temperature / target_temperature)
    return torch.log_softmax(log_probs * (temperature / target_temperature), dim=-1)


def temperatures_of(cache_temperature: float, sampled: bool) -> list[float]:
    """Temperatures to measure at: the cache's own first, then others that students might use.

    A sampled cache cannot be re-tempered and has only its own.
    """
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
    """Run the teacher again on random rows and measure the KL divergence of what is stored.

    Args:
        source: the whole data set, in the order of the dump.
        rows: how many rows to draw; fewer are used if the cache is smaller or has many classes.

    Returns:
        rows: how many rows were measured.
        mean, p99, worst: of the KL at the cache's temperature, in nats.
        at: the mean KL by temperature.
        moved: the share of the probability mass that moves when the rows are encoded again.
        precision: mean KL(float32 ‖ teacher), only if the teacher ran at a lower precision.
        repeats: mean KL of two answers to the same documents, only if a teacher is behind a server.
        unstored: mean -ln(mass of the stored classes) in nats, only of `topk`: KL(q ‖ teacher), where q is
            the K classes alone, divided by their sum.
    """
    header = cache.header
    rows = max(1, min(rows, VALUES // header.classes))
    layout = layout_of_source(source)
    if layout is None:
        pairs = draw_rows(header.views, header.samples, rows, header.seed)
        first = np.array([header.first_view, header.first_sample])
    else:
        first = np.array([header.first_view, layout.offsets[header.first_sample]])
        rows = max(1, min(rows, VALUES_OF_ROWS // header.classes))
        pairs = draw_rows_of_samples(layout, header.views, header.sample_range, rows, header.seed)
        pairs[:, 1] -= first[1]
    log_probs = teacher_rows(
        teachers,
        source,
        pairs + first,
        temperature=header.temperature,
        augmentation=augmentation,
        workers=workers,
    )
    means = {}
    kl_at_own = np.zeros(0)
    sampled, multi_label = isinstance(header.encoding, Sampled), header.multi_label
    for temperature in temperatures_of(header.temperature, sampled):
        kl = _stored_divergence(cache, pairs, log_probs, temperature)
        means[f"{temperature:g}"] = float(kl.mean())
        kl_at_own = kl if temperature == header.temperature else kl_at_own
    exact_teachers = teachers.in_float32
    cost = {}
    if exact_teachers is not None:
        subset = pairs[:: max(1, len(pairs) // PRECISION_ROWS)] + first
        exact, reduced = (
            teacher_rows(
                ensemble, source, subset, temperature=header.temperature, augmentation=augmentation
            )
            for ensemble in (exact_teachers, teachers)
        )
        cost = {"precision": float(divergence(exact, reduced, multi_label=multi_label).mean())}
    if layout is not None and teachers.asks_server:
        asked = np.unique(samples := layout.samples_of(pairs[:, 1] + first[1]))
        asked = asked[np.linspace(0, len(asked) - 1, min(len(asked), REPEATED_SAMPLES)).astype(int)]
        same = np.isin(samples, asked)
        again = teacher_rows(
            teachers,
            source,
            pairs[same] + first,
            temperature=header.temperature,
            augmentation=augmentation,
        )
        answered = log_probs[torch.from_numpy(same).to(log_probs.device)]
        cost["repeats"] = max(0.0, float(divergence(answered, again).mean()))
    if isinstance(header.encoding, TopK):
        cost["unstored"] = _unstored(cache, pairs, log_probs.device)
    return cost | {
        "rows": len(pairs),
        "mean": float(kl_at_own.mean()),
        "p99": float(np.quantile(kl_at_own, 0.99)),
        "worst": float(kl_at_own.max()),
        "at": means,
        "moved": _moved(cache, pairs, log_probs),
    }


def hint_of_tail(header: Header, fidelity: dict[str, Any]) -> str | None:
    """What a cache of tokens lacks if the K classes do not hold most of the probability; None if they do."""
    stored = math.exp(-fidelity.get("unstored", 0.0))
    if header.unit != "token" or stored > MOST_OF_THE_MASS:
        return None
    return (
        f"the classes that {header.encoding.name} stores have {stored:.0%} of the probability (geometric "
        "mean). Of the others a student learns the sum alone, and may end up worse than one of labels. "
        "Where the teacher itself can run, --encoding packed:36 leaves nothing out, in 36 bytes a token"
    )


def repeats_warnings(fidelity: dict[str, Any]) -> list[str]:
    """A warning if a server gave another answer when it was asked again; empty if it did not."""
    repeats = fidelity.get("repeats", 0.0)
    if repeats <= MOST_REPEATS_KL:
        return []
    return [
        f"the server gives another answer to the same document: the KL of two of them is {repeats:.1e} nats "
        f"on average, and at most {MOST_REPEATS_KL:g} is rounding. Rows may be stale, as with prefix caching "
        "(vLLM: --no-enable-prefix-caching), or come from several models; correct it and dump again with "
        "--overwrite"
    ]


def _stored_divergence(
    cache: Cache, pairs: Pairs, log_probs: Tensor, target_temperature: float
) -> npt.NDArray[np.float64]:
    """KL (n,) between the teacher's rows (n, C) and the stored ones, at `target_temperature`."""
    fetch = soft_targets(cache, target_temperature, log_probs.device)
    divergences, done = [], 0
    for view, cache_rows in _batches(pairs, max(1, min(BATCH, BATCH_VALUES // log_probs.shape[1]))):
        batch = log_probs[done : done + len(cache_rows)]
        multi_label = cache.header.multi_label
        exact = retemper(
            batch, cache.header.temperature, target_temperature, multi_label=multi_label
        )
        stored = fetch(view, cache_rows)
        kl = divergence(exact, stored, multi_label=multi_label)
        divergences.append(kl.double().cpu().numpy())
        done += len(cache_rows)
    return np.concatenate(divergences)


def _unstored(cache: Cache, pairs: Pairs, device: torch.device) -> float:
    """Mean -ln(mass of the stored classes) of rows of `topk`."""
    fetch, total = soft_targets(cache, cache.header.temperature, device), 0.0
    for view, cache_rows in _batches(pairs):
        targets = fetch(view, cache_rows)
        if isinstance(targets, SparseTargets):
            total -= float(targets.log_probs.logsumexp(-1).clamp(max=0).double().sum())
    return total / len(pairs)


def _moved(cache: Cache, pairs: Pairs, log_probs: Tensor) -> float:
    """Mean total variation distance between the stored rows and the same rows encoded again."""
    header = cache.header
    shared = shared_tensors(cache)
    encode = make_encoder(
        header.encoding,
        shared,
        temperature=header.temperature,
        seed=header.seed,
        device=log_probs.device,
    )
    fetch = soft_targets(cache, header.temperature, log_probs.device)
    total, done, layout = 0.0, 0, cache.layout
    for view, cache_rows in _batches(pairs, max(1, min(BATCH, BATCH_VALUES // log_probs.shape[1]))):
        samples = cache_rows if layout is None else layout.samples_of(cache_rows)
        encoded = encode(
            log_probs[done : done + len(cache_rows)],
            header.first_view + view,
            header.first_sample + samples,
            None if layout is None else layout.positions_of(cache_rows),
        )
        if "ids" in encoded:
            encoded["ids"] = class_ids(encoded["ids"], header.classes)
        again = decode(
            header.encoding,
            encoded | {name: tensor.to(log_probs.device) for name, tensor in shared.items()},
            temperature=header.temperature,
            wanted=header.temperature,
            classes=header.classes,
        )
        rows = to_dense(again), to_dense(fetch(view, cache_rows))
        if header.multi_label:
            difference = rows[0].sigmoid() - rows[1].sigmoid()
            total += float(difference.abs().mean(-1).sum())
        else:
            difference = rows[0].exp() - rows[1].exp()
            total += float(difference.abs().sum()) / 2
        done += len(cache_rows)
    return total / len(pairs)


def _batches(pairs: Pairs, size: int = BATCH) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Split sorted pairs into a view and at most `size` of its samples at a time."""
    for view in map(int, np.unique(pairs[:, 0])):
        samples = pairs[pairs[:, 0] == view, 1]
        for batch in np.split(samples, range(size, len(samples), size)):
            yield view, batch


def fidelity_line(fidelity: dict[str, Any], sampled: bool) -> str:
    """The result of measure_fidelity() as one line of text."""
    means = ", ".join(f"T={t} {kl:.1e}" for t, kl in fidelity["at"].items())
    cost = fidelity.get("precision")
    note = "" if cost is None else f"; the precision costs KL(float32 ‖ teacher) {cost:.1e}"
    if "repeats" in fidelity:
        note += f"; two answers to the same documents differ by KL {fidelity['repeats']:.1e}"
    if "unstored" in fidelity:
        note += f"; -ln(mass of the stored classes) {fidelity['unstored']:.1e}"
    if sampled:
        note += " (of single draws, which are the teacher's on the average)"
    direction = "KL(stored ‖ teacher)" if sampled else "KL(teacher ‖ stored)"
    return (
        f"fidelity: {direction} mean {fidelity['mean']:.1e}, 99th percentile "
        f"{fidelity['p99']:.1e}, worst {fidelity['worst']:.1e} nats on {fidelity['rows']:,} rows; "
        f"mean at {means}{note}"
    )

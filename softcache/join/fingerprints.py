"""Fingerprints: check before training that augmented inputs are still those that the teacher saw."""

from __future__ import annotations

import math
import platform

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache._version import __version__
from softcache.cache import Cache, Header
from softcache.cache.arrays import FINGERPRINT
from softcache.data.augment import Augmentation, parse_augment, split_augment
from softcache.data.loader import augmented, loader, make_request
from softcache.data.rows import PADDING, has_tokens
from softcache.data.source import Source
from softcache.data.text import text_lengths
from softcache.errors import DataError, FormatError, SettingsError
from softcache.util.counter_rng import uniform
from softcache.util.log import inform

FINGERPRINTED = 8  # samples with fingerprints in each view
TOLERANCE = 2e-3  # of the input's root mean square: far above float noise, far below another crop


def software() -> dict[str, str]:
    """Versions of the software that inputs and logits depend on."""
    return {
        "softcache": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def fingerprints(
    source: Source,
    augmentation: Augmentation,
    *,
    views: range,
    sample_ids: npt.NDArray[np.int64],
    source_indices: npt.NDArray[np.int64] | None = None,
    source_index_of: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Compute fingerprints of samples in every view.

    Args:
        source: the source of the samples.
        augmentation: makes the views.
        views: the numbers of the views.
        sample_ids: (F,) numbers of the samples in the augmentation's draws.
        source_indices: (F,) indices of the samples in the source; by default the sample ids.
        source_index_of: (all samples,) the source index of each sample id, for mixup; None if they are equal.

    Returns:
        The fingerprints (views, F, FINGERPRINT), and the root mean square of each input (views, F).
    """
    indices = (sample_ids if source_indices is None else source_indices).tolist()
    requests = [
        make_request(augmentation, indices, view, sample_ids, source_index_of) for view in views
    ]
    prints = np.empty((len(views), len(sample_ids), FINGERPRINT), np.float32)
    rms = np.empty((len(views), len(sample_ids)), np.float32)
    for row, batch in enumerate(loader(source, requests, augmentation=augmentation)):
        inputs = augmented(batch, augmentation, views[row], sample_ids, torch.device("cpu"))
        inputs = inputs.nan_to_num(
            0.0, math.inf, -math.inf
        )  # a missing value is the same in two readings
        lengths = None
        if has_tokens(source):
            lengths = (inputs != PADDING).sum(1).numpy()
            inputs = inputs.masked_fill(inputs == PADDING, 0)
        elif getattr(source, "text", False):
            lengths = text_lengths(inputs.numpy())
        prints[row] = fingerprint(inputs, lengths)
        rms[row] = inputs.double().flatten(1).square().mean(1).sqrt().numpy()
    return prints, rms


def reproducible_fingerprints(
    source: Source, augmentation: Augmentation, views: range, sample_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Fingerprints (views, F, FINGERPRINT), computed twice, the second time in reverse order.

    Raises:
        DataError: the two differ, so the data or the augmentation cannot be replayed.
    """
    first, rms = fingerprints(source, augmentation, views=views, sample_ids=sample_ids)
    second, _ = fingerprints(
        source, augmentation, views=views[::-1], sample_ids=sample_ids[::-1].copy()
    )
    differing = _differing(np.abs(first - second[::-1, ::-1]).max(-1), rms)
    if len(differing):
        view, number = map(int, differing[0])
        raise DataError(
            f"sample {sample_ids[number]} of {source.name} in view {views[view]} is different when it is "
            "loaded again: the data or the augmentation has a random state of its own; draw only from "
            "Python's random, numpy.random and torch, which are seeded for each sample, and give data "
            "without random transforms"
        )
    return first


def _differing(
    distances: npt.NDArray[np.float32], rms: npt.NDArray[np.float32]
) -> npt.NDArray[np.intp]:
    """Positions (D, 2), view and sample, where fingerprints (views, F) differ; NaN always does."""
    return np.argwhere(~(distances <= TOLERANCE * np.maximum(rms, 1e-3)))


def fingerprinted_rows(samples: int) -> npt.NDArray[np.int64]:
    """The cache rows (F,) that get fingerprints: a few, spread evenly over all samples."""
    return np.unique(np.linspace(0, samples - 1, FINGERPRINTED).astype(np.int64))


def replayed(header: Header, own: str | None) -> Augmentation:
    """The augmentation that made a cache's views.

    Built-in augmentations are rebuilt from the header. Code that a header names is never imported: the user
    must give the whole specification in `own`, with the path to the file.

    Args:
        header: the header of the cache.
        own: the user's augmentation, which must be the one in the header; None or empty to use the header.

    Raises:
        SettingsError: the user's augmentation is missing, or is not the one in the header.
    """
    own = own or None
    has_code = ".py:" in (header.augment or "")
    if split_augment(own).public_name not in (None, header.augment):
        advice = f"give all of {header.augment}" if has_code else "leave it out"
        raise SettingsError(
            f"--augment {own} is not the cache's own ({header.augment or 'none'}): it would change the "
            f"pixels that the cached targets belong to; {advice}, or add it on top with --extra-augment"
        )
    if own is None and has_code:
        raise SettingsError(
            f"the cache was augmented by {header.augment}; give all of this with --augment, with the "
            "path to your file, since code named in a cache is never run automatically"
        )
    return parse_augment(own or header.augment, seed=header.seed, total=header.data_samples)


def check_replay(
    cache: Cache,
    source: Source,
    augmentation: Augmentation,
    source_indices: npt.NDArray[np.int64],
    source_index_of: npt.NDArray[np.int64],
) -> None:
    """Check that the inputs are still those that the teacher saw.

    Args:
        cache: holds the fingerprints of the dump.
        source: the data to train on.
        augmentation: the augmentation to train with.
        source_indices: (samples,) the source index of each cache row, -1 where the source lacks it.
        source_index_of: (data_samples,) the source index of each sample id, for mixup.

    Raises:
        DataError: an input differs from the one that the teacher saw.
        FormatError: the cache has fingerprints of samples that it does not have.
    """
    header = cache.header
    cache_rows = np.array(cache.arrays["fingerprinted"])  # (F,)
    if cache_rows.min() < 0 or cache_rows.max() >= header.samples:
        raise FormatError(
            f"{cache.path} has fingerprints of samples {cache_rows.min()} to {cache_rows.max()}; expected 0 "
            f"to {header.samples - 1}: the file is damaged or forged, get it again"
        )
    present = source_indices[cache_rows] >= 0
    if not present.any():
        if header.augment:
            inform(
                f"note: {source.name} has none of the samples with fingerprints in {cache.path}; whether its "
                "views are replayed exactly cannot be checked"
            )
        return
    cache_rows = cache_rows[present]
    current, rms = fingerprints(
        source,
        augmentation,
        views=header.view_range,
        sample_ids=cache_rows + header.first_sample,
        source_indices=source_indices[cache_rows],
        source_index_of=source_index_of,
    )
    stored = cache.arrays["fingerprints"][: header.views, present]
    distances = np.abs(current - stored).max(-1)  # (views, F)
    differing = _differing(distances, rms)
    if len(differing):
        view, number = map(int, differing[0])
        source_index = source_indices[cache_rows[number]]
        versions = [
            f"{name} was {header.software.get(name)}, is {version}"
            for name, version in software().items()
            if header.software.get(name) != version
        ]
        raise DataError(
            f"sample {source_index} of {source.name} in view {header.first_view + view} is not what the "
            f"teacher of {cache.path} saw (its fingerprint is off by {distances[view, number]:.2g}): the "
            "augmentation or the data's own transform has changed; "
            f"{'; '.join(versions) or 'no library version differs'}"
        )


def fingerprint(
    inputs: Tensor, lengths: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float32]:
    """Project inputs (F, *shape) onto fixed random signs, (F, FINGERPRINT) float32; see FORMAT.md.

    Args:
        lengths: (F,) how many values of each input are not padding, which is 0; None for all.
    """
    rows = inputs.cpu().double().flatten(1).numpy()  # (F, n)
    pixels = np.arange(rows.shape[1])
    signs = [uniform(0, j, pixels, stream=0, draws=1)[:, 0] < 0.5 for j in range(FINGERPRINT)]
    counts = rows.shape[1] if lengths is None else lengths.clip(1)[:, None]
    projected = rows @ np.where(np.stack(signs, -1), 1.0, -1.0) / np.sqrt(counts)
    return np.asarray(projected, np.float32)

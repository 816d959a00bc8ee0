"""Is an augmented input still the one that the teacher saw? Fingerprints tell, before training."""

from __future__ import annotations

import platform

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache._version import __version__
from softcache.cache import Cache, Header
from softcache.cache.header import FINGERPRINT
from softcache.data.augment import Augmentation, parse_augment, split_augment
from softcache.data.loader import augmented, loader, make_request
from softcache.data.source import Source
from softcache.errors import DataError, FormatError, SettingsError
from softcache.util.counter_rng import uniform

FINGERPRINTED = 8  # samples of each view

TOLERANCE = 2e-3  # of the input's root mean square: far above float noise, far below another crop


def software() -> dict[str, str]:
    """Versions of what decides how inputs and logits come out."""
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
    """Fingerprints (views, F, FINGERPRINT) of samples in every view, and their inputs' size.

    Args:
        sample_ids: (F,) in the draws of the augmentation.
        source_indices: (F,) in the source; by default the sample ids.
        source_index_of: (all samples,) by sample id, among which mixup chooses.

    Returns:
        The fingerprints, and the root mean square of each input (views, F).
    """
    indices = (sample_ids if source_indices is None else source_indices).tolist()
    requests = [
        make_request(augmentation, indices, view, sample_ids, source_index_of) for view in views
    ]
    found = np.empty((len(views), len(sample_ids), FINGERPRINT), np.float32)
    sizes = np.empty((len(views), len(sample_ids)), np.float32)
    for at, batch in enumerate(loader(source, requests, augmentation=augmentation)):
        inputs = augmented(batch, augmentation, views[at], sample_ids, torch.device("cpu"))
        found[at] = fingerprint(inputs)
        sizes[at] = inputs.double().flatten(1).square().mean(1).sqrt().numpy()
    return found, sizes


def reproducible_fingerprints(
    source: Source, augmentation: Augmentation, views: range, sample_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Fingerprints (views, F, FINGERPRINT) that come out the same in another order.

    Raises:
        DataError: they do not, so the data or the augmentation cannot be replayed.
    """
    found, sizes = fingerprints(source, augmentation, views=views, sample_ids=sample_ids)
    again, _ = fingerprints(
        source, augmentation, views=views[::-1], sample_ids=sample_ids[::-1].copy()
    )
    off = np.abs(found - again[::-1, ::-1]).max(-1)
    unsteady = np.argwhere(~(off <= TOLERANCE * np.maximum(sizes, 1e-3)))
    if len(unsteady):
        view, place = map(int, unsteady[0])
        raise DataError(
            f"sample {sample_ids[place]} of {source.name} in view {views[view]} comes out different "
            "the second time: the data or the augmentation have a state of its own; draw only from "
            "python's random, numpy.random and torch, which are seeded for each sample, and give data "
            "without random transforms"
        )
    return found


def fingerprinted_rows(samples: int) -> npt.NDArray[np.int64]:
    """Which samples get fingerprints: a few, spread evenly."""
    return np.unique(np.linspace(0, samples - 1, FINGERPRINTED).astype(np.int64))


def replayed(header: Header, own: str | None) -> Augmentation:
    """The augmentation that made the cache's views.

    Built-in ones are known from the header. A callable of the user's own is never imported for a
    name in a file: `own` must give it, and be what the header names.

    Raises:
        SettingsError: it is not given, or is another one.
    """
    own = own or None
    if split_augment(own).public_name not in (None, header.augment):
        raise SettingsError(
            f"--augment {own} is not the cache's own ({header.augment or 'none'}): it would change the "
            "pixels that the cached targets belong to; leave it out, or add it on top by "
            "--extra-augment if you mean to"
        )
    if own is None and ".py:" in (header.augment or ""):
        raise SettingsError(
            f"the cache was augmented by {header.augment}; give that file with --augment, code named "
            "in a cache is never run by itself"
        )
    return parse_augment(own or header.augment, seed=header.seed, total=header.data_samples)


def check_replay(
    cache: Cache,
    source: Source,
    augmentation: Augmentation,
    source_indices: npt.NDArray[np.int64],
    source_index_of: npt.NDArray[np.int64],
) -> None:
    """Raise DataError if an input of today is not the one that the teacher saw.

    Args:
        source_indices: (samples,) index in `source` of each row of the cache.
        source_index_of: (data_samples,) by sample id, among which mixup chooses.
    """
    header = cache.header
    chosen = np.array(cache.arrays["fingerprinted"])
    if chosen.min() < 0 or chosen.max() >= header.samples:
        raise FormatError(
            f"{cache.path} has fingerprints of samples {chosen.min()} to {chosen.max()}; expected 0 to "
            f"{header.samples - 1}: the file is damaged or forged, get it again"
        )
    now, sizes = fingerprints(
        source,
        augmentation,
        views=header.view_range,
        sample_ids=chosen + header.first_sample,
        source_indices=source_indices[chosen],
        source_index_of=source_index_of,
    )
    off = np.abs(now - cache.arrays["fingerprints"][: header.views]).max(-1)  # (views, F)
    drifted = np.argwhere(~(off <= TOLERANCE * np.maximum(sizes, 1e-3)))
    if len(drifted):
        view, number = map(int, drifted[0])
        source_index = source_indices[chosen[number]]
        versions = [
            f"{name} was {header.software.get(name)}, is {version}"
            for name, version in software().items()
            if header.software.get(name) != version
        ]
        raise DataError(
            f"sample {source_index} of {source.name} in view {header.first_view + view} is not what the "
            f"teacher of {cache.path} saw (its fingerprint is off by {off[view, number]:.2g}): the "
            "augmentation or the data's own transform has changed; "
            f"{'; '.join(versions) or 'no library version differs'}"
        )


def fingerprint(inputs: Tensor) -> npt.NDArray[np.float32]:
    """Projections on fixed random signs of inputs (F, *shape), (F, FINGERPRINT); see FORMAT.md."""
    rows = inputs.cpu().double().flatten(1).numpy()  # (F, n)
    places = np.arange(rows.shape[1])
    signs = [uniform(0, j, places, stream=0, draws=1)[:, 0] < 0.5 for j in range(FINGERPRINT)]
    projected = rows @ np.where(np.stack(signs, -1), 1.0, -1.0) / np.sqrt(rows.shape[1])
    return np.asarray(projected, np.float32)

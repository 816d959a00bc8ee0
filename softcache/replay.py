"""Is an augmented input still the one that the teacher saw? Fingerprints tell, before training."""

from __future__ import annotations

import platform

import numpy as np
import numpy.typing as npt
import torch

from softcache import __version__
from softcache.cache import Cache
from softcache.cache.header import FINGERPRINT
from softcache.data import Source, to_float
from softcache.errors import DataError
from softcache.views import augment, fingerprint, parse_augment

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
    augmentation: str | None,
    *,
    seed: int,
    views: range,
    indices: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Fingerprints (views, F, FINGERPRINT) of samples in every view, and their inputs' size.

    Args:
        indices: (F,) where the samples are in `source`.
        samples: (F,) their numbers in the draws of the augmentation.

    Returns:
        The fingerprints, and the root mean square of each input (views, F).
    """
    ops = parse_augment(augmentation)
    raw = to_float(source.fetch(indices.tolist())[0])
    found = np.empty((len(views), len(indices), FINGERPRINT), np.float32)
    sizes = np.empty((len(views), len(indices)), np.float32)
    for at, view in enumerate(views):
        inputs = augment(raw, ops, seed=seed, view=view, samples=samples)
        found[at] = fingerprint(inputs)
        sizes[at] = inputs.double().flatten(1).square().mean(1).sqrt().numpy()
    return found, sizes


def fingerprinted_rows(samples: int) -> npt.NDArray[np.int64]:
    """Which samples get fingerprints: a few, spread evenly."""
    return np.unique(np.linspace(0, samples - 1, FINGERPRINTED).astype(np.int64))


def check_replay(cache: Cache, source: Source, rows: npt.NDArray[np.int64]) -> None:
    """Raise DataError if an input of today is not the one that the teacher saw.

    Args:
        rows: (N,) the row of the cache for each sample of `source`.
    """
    header = cache.header
    chosen = np.array(cache.arrays["fingerprinted"])
    where = np.argsort(rows)[chosen]
    now, sizes = fingerprints(
        source,
        header.augment,
        seed=header.seed,
        views=range(header.first_view, header.first_view + header.views),
        indices=where,
        samples=chosen + header.first_sample,
    )
    off = np.abs(now - cache.arrays["fingerprints"]).max(-1)  # (views, F)
    drifted = np.argwhere(~(off <= TOLERANCE * np.maximum(sizes, 1e-3)))
    if len(drifted):
        view, place = map(int, drifted[0])
        versions = [
            f"{name} was {header.software.get(name)}, is {version}"
            for name, version in software().items()
            if header.software.get(name) != version
        ]
        raise DataError(
            f"sample {where[place]} of {source.name} in view {view} is not what the teacher of "
            f"{cache.path} saw (its fingerprint is off by {off[view, place]:.2g}): the augmentation or "
            f"the data's own transform has changed; {'; '.join(versions) or 'no library version differs'}"
        )

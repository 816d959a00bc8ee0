"""The temperature of the soft targets where none is asked for: a rule, and the measurements behind it.

In 41 settings of five tasks, three budgets and two sizes of student (tests/bench/gains.py), temperature 1
never lost to hard labels by more than a standard error, whereas 4 lost in 20, wherever training was short:
near a uniform distribution, gradients are small at first, so a student learns more slowly (Hinton, Vinyals
and Dean, arXiv 1503.02531, section 2.1, for the limit of high temperatures). But a teacher that is nearly
certain at temperature 1 says hardly more than the labels, and then a higher one is needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from softcache.cache import Cache, Sampled
from softcache.train.config import TrainConfig

CANDIDATES = (1.0, 2.0, 4.0)
ENOUGH = 0.02  # of log C: the entropy of soft targets that say more than the labels
ROWS = 2000  # of the first view, on which entropy is measured
VALUES = 1 << 24  # probabilities that are decoded for it, at most


def with_temperatures(config: TrainConfig, caches: Sequence[Cache]) -> tuple[TrainConfig, str]:
    """The settings, with a temperature for every student that is to learn from soft targets.

    Returns:
        The settings, and a line that says what was chosen and why; empty if nothing was.
    """
    needed = [
        student
        for student in config.students
        if student.temperature is None and config.soft_weight(student) > 0
    ]
    different = len({cache.header.temperature for cache in caches}) > 1
    if not caches or not needed or (any(_is_sampled(cache) for cache in caches) and different):
        return config, ""  # or an error that names the caches is raised later
    temperature, reason = default_temperature(caches)
    students = [
        dataclasses.replace(student, temperature=temperature) if student in needed else student
        for student in config.students
    ]
    line = f"temperature {temperature:g}: {reason}; --temperature sets another"
    return dataclasses.replace(config, students=students), line


def default_temperature(caches: Sequence[Cache]) -> tuple[float, str]:
    """The temperature for the soft targets of some caches, and why, in a phrase.

    The lowest of CANDIDATES at which the entropy of the soft targets is at least ENOUGH of that of a uniform
    distribution; draws of a `sampled` cache have only the temperature that they were made at.
    """
    if any(_is_sampled(cache) for cache in caches):
        return caches[0].header.temperature, "the only one of sampled soft targets"
    shares = {t: entropy_share(caches, t) for t in CANDIDATES}
    chosen = next((t for t, share in shares.items() if share >= ENOUGH), CANDIDATES[-1])
    text = f"the soft targets have {shares[chosen]:.1%} of the largest entropy"
    if chosen > CANDIDATES[0]:
        text += f", and only {shares[CANDIDATES[0]]:.1%} at {CANDIDATES[0]:g}"
    return chosen, text


def entropy_share(caches: Sequence[Cache], temperature: float) -> float:
    """Mean entropy of the first views of some caches at a temperature, as a share of log C."""
    entropies = []
    for cache in caches:
        samples, classes = cache.header.samples, cache.header.classes
        count = max(1, min(samples, ROWS, VALUES // classes))
        rows = np.unique(np.linspace(0, samples - 1, count).astype(np.int64))
        for part in np.array_split(rows, -(-len(rows) * classes // (1 << 22))):
            log_probs = cache.rows(0, part, temperature).astype(np.float64)  # (B, C)
            entropies += (-(np.exp(log_probs) * log_probs).sum(-1) / math.log(classes)).tolist()
    return float(np.mean(entropies))


def _is_sampled(cache: Cache) -> bool:
    return isinstance(cache.header.encoding, Sampled)

"""The temperature of the soft targets where none is asked for: a rule, from measurements.

Soft targets near a uniform distribution have small gradients at first, so a student learns more slowly from
high temperatures (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2.1, for the limit), which costs more
than the finer differences between classes bring. So the temperature is the lowest at which the soft targets
say more than the labels do: on augmented views always, since labels know nothing of them; on the samples
themselves, where they have some entropy. Of a teacher that gives nearly all samples their label, as of those
that it has learned by heart, it takes more. The thresholds are those that tests/bench/gains.py found best.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from softcache.cache import Cache, Sampled
from softcache.cache.summary import binary_entropy
from softcache.data.rows import TOKEN
from softcache.train.config import StudentConfig, TrainConfig

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
SHORT = 20  # epochs: fewer are a short training
ENTROPY, SHORT_ENTROPY = 0.02, 0.01  # of log C: enough, for a long and for a short training
MEMORIZED, MEMORIZED_ENTROPY = (
    0.999,
    0.1,
)  # agreement with the labels, and the entropy that it calls for
ROWS = 2000  # of the first view, on which entropy is measured
VALUES = 1 << 24  # probabilities that are decoded for it, at most


def with_defaults(config: TrainConfig, caches: Sequence[Cache]) -> tuple[TrainConfig, str]:
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
    temperature, reason = default_temperature(caches, config.epochs)
    students = [
        dataclasses.replace(student, temperature=temperature) if student in needed else student
        for student in config.students
    ]
    line = f"temperature {temperature:g}: {reason}; {other_defaults(config, needed)}"
    config = dataclasses.replace(config, students=students, given_names=config.names())
    return config, line


def other_defaults(config: TrainConfig, students: Sequence[StudentConfig]) -> str:
    """What else is a default for some students, why, and which options set other values, in a phrase."""
    chosen, options = [], ["--temperature"]
    if any(student.alpha is None for student in students):
        weights = {config.soft_weight(student) for student in students if student.alpha is None}
        reasons = {1.0: "the labels add nothing to them", 0.9: "for the options of the hard loss"}
        chosen += [f"alpha {weight:g}: {reasons[weight]}" for weight in sorted(weights)]
        options.append("--alpha")
    if any(student.loss is None for student in students):
        chosen.append("loss kl")
        options.append("--loss")
    sets = "sets another" if len(options) == 1 else "set others"
    listed = " and ".join([", ".join(options[:-1]), options[-1]] if options[1:] else options)
    return "; ".join([*chosen, f"{listed} {sets}"])


def default_temperature(caches: Sequence[Cache], epochs: int) -> tuple[float, str]:
    """The temperature for the soft targets of some caches, and why, in a phrase.

    The lowest of TEMPERATURES, and without augmentation the lowest at which the entropy of the soft targets
    is a large enough share of that of a uniform distribution. Draws of a `sampled` cache have only the
    temperature that they were made at.
    """
    if any(_is_sampled(cache) for cache in caches):
        return caches[0].header.temperature, "the only one of sampled soft targets"
    if all(cache.header.unit == TOKEN for cache in caches):
        return caches[0].header.temperature, "that of the cache, of tokens"
    if all(cache.header.augment for cache in caches):
        return TEMPERATURES[
            0
        ], "of augmented views, even certain soft targets say more than the labels"
    enough = SHORT_ENTROPY if epochs < SHORT else ENTROPY
    known = all(_knows_all_labels(cache) for cache in caches)
    if known:
        enough = MEMORIZED_ENTROPY
    shares: dict[float, float] = {}
    for temperature in TEMPERATURES:
        shares[temperature] = entropy_share(caches, temperature)
        if shares[temperature] >= enough:
            break
    *lower, chosen = shares
    text = f"the soft targets have {shares[chosen]:.1%} of the largest entropy"
    if lower:
        text += f", and only {shares[lower[-1]]:.1%} at {lower[-1]:g}"
    if known:
        text += ", from a teacher that knows all labels"
    return chosen, text


def entropy_share(caches: Sequence[Cache], temperature: float) -> float:
    """Mean entropy of the first views of some caches at a temperature, as a share of log C."""
    entropies = []
    for cache in caches:
        samples, classes = cache.header.row_count, cache.header.classes
        count = max(1, min(samples, ROWS, VALUES // classes))
        rows = np.unique(np.linspace(0, samples - 1, count).astype(np.int64))
        for part in np.array_split(rows, -(-len(rows) * classes // (1 << 22))):
            log_probs = cache.rows(0, part, temperature).astype(np.float64)  # (B, C)
            if cache.header.multi_label:
                entropies += (binary_entropy(log_probs).mean(-1) / math.log(2)).tolist()
                continue
            entropies += (-(np.exp(log_probs) * log_probs).sum(-1) / math.log(classes)).tolist()
    return float(np.mean(entropies))


def _knows_all_labels(cache: Cache) -> bool:
    """Whether the teacher's top class is nearly always the label, as on samples learned by heart."""
    return ((cache.header.summary or {}).get("agreement") or 0.0) >= MEMORIZED


def _is_sampled(cache: Cache) -> bool:
    return isinstance(cache.header.encoding, Sampled)

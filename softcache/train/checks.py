"""Settings that do not fit the caches: refused before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softcache.cache import Cache, Sampled, TopK
from softcache.data.augment import split_augment
from softcache.data.rows import FRAME
from softcache.errors import SettingsError
from softcache.losses import parse_loss
from softcache.train.class_weights import BALANCED, read_weights
from softcache.train.config import TrainConfig


def check_rows(config: TrainConfig, caches: Sequence[Cache]) -> None:
    """Raise SettingsError if a setting has no meaning for samples with many rows."""
    units = {cache.header.unit for cache in caches}
    if len(units) > 1:
        raise SettingsError(
            f"the caches have rows of different kinds, {', '.join(sorted(units))}; train a student from each"
        )
    many = next((cache for cache in caches if cache.header.rows is not None), None)
    if many is None:
        return
    if many.header.unit == FRAME:
        check_frames(config, many)
    refused = {
        "--tune": config.tune is not None,
        "--sampling balanced": config.sampling == BALANCED,
        "--class-weights": any(student.class_weights for student in config.students),
        "--extra-augment": config.extra_augment is not None,
    }
    for option, given in refused.items():
        if given:
            raise SettingsError(
                f"{option} needs a label for each sample, and {many.path} has many {many.header.unit}s of "
                "each; leave it out"
            )


def check_frames(config: TrainConfig, cache: Cache) -> None:
    """Raise SettingsError if a setting needs labels, which frames do not have."""
    refused = {
        "--baseline": config.baseline,
        "--eval-data": config.eval_data is not None,
        "--patience": config.patience is not None,
        "--label-smoothing": any(student.label_smoothing for student in config.students),
    }
    for student in config.students:
        weight = config.soft_weight(student)
        refused |= {f"--alpha {weight:g}": weight < 1}
    for option, given in refused.items():
        if given:
            raise SettingsError(
                f"{option} needs labels, and the frames of {cache.path} have none: a transcript says "
                "nothing of a single frame. Leave it out; students are compared with the teacher on rows of "
                "the cache"
            )


def check_losses(config: TrainConfig, caches: Sequence[Cache]) -> None:
    """Raise SettingsError if a loss needs something that is not there, rather than at the first step."""
    if any(cache.header.multi_label for cache in caches):
        check_multi_label(config, caches)
    for student in config.students:
        if student.loss == "bernoulli" and not any(cache.header.multi_label for cache in caches):
            raise SettingsError("loss bernoulli needs a CACHE of --targets sigmoid; use --loss kl")
        if student.class_weights not in (None, BALANCED):
            read_weights(Path(str(student.class_weights)))
        name, _ = parse_loss(student.soft_loss)
        for cache in caches:
            is_sparse = isinstance(cache.header.encoding, TopK | Sampled)
            encoding = cache.header.encoding.name
            if (name == "mse" and is_sparse) or (
                name in ("reverse_kl", "correlation") and isinstance(cache.header.encoding, Sampled)
            ):
                raise SettingsError(
                    f"loss {name} needs the probabilities of all classes, and {cache.path} is {encoding}; "
                    "use --loss kl"
                )
            mixed = split_augment(cache.header.augment).mixup
            if name == "dkd" and (mixed or bool((cache.labels < 0).any())):
                raise SettingsError(
                    f"loss dkd needs one label per sample, and {cache.path} has "
                    f"{'mixed samples' if mixed else 'samples without a label'}; use --loss kl"
                )


def check_multi_label(config: TrainConfig, caches: Sequence[Cache]) -> None:
    """Raise SettingsError if a setting needs one label per sample, and a cache has any number."""
    refused = {
        "--sampling balanced": config.sampling == BALANCED,
        "--class-weights": any(student.class_weights for student in config.students),
        "--loss": any(student.loss not in (None, "kl", "bernoulli") for student in config.students),
        "--tune": config.tune is not None,
    }
    for option, given in refused.items():
        if given:
            raise SettingsError(
                f"{option} needs one label per sample, and {caches[0].path} has any number; leave it out"
            )
    if not all(cache.header.multi_label for cache in caches):
        raise SettingsError(
            "some caches have one label per sample and some any number; train a student from each kind"
        )

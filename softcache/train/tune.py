"""`--tune`: choose the settings of students on held-out training samples, without the teacher.

Successive halving (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter
optimization", arXiv 1502.07943, section 3) over settings drawn at random (Bergstra and Bengio, "Random
search for hyper-parameter optimization", JMLR 13, 2012): all settings are tried briefly, the best quarter of
them for longer. Each round is a training of its own, with its own learning rate schedule, so that its errors
can be compared; all students of a round share every batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tabulate import tabulate
from torch import Tensor

from softcache.cache import Packed, Sampled, TopK
from softcache.errors import Interrupted, SettingsError
from softcache.join.joined_data import JoinedData
from softcache.models.outputs import logits_of
from softcache.targets.decode import to_dense
from softcache.targets.fetch import tempered_targets
from softcache.train.config import StudentConfig, TrainConfig
from softcache.train.student import Student
from softcache.train.tuning_record import NAME, Score, TuningRecord
from softcache.util.log import inform
from softcache.util.settings import option_name, settings_of
from softcache.util.tensors import to_float

FOLDER = "tuning"  # where the students of a round are, until it is over
COST = 1.3  # of all rounds together, in trainings of one student
KEEP = 4  # one in so many goes on to the next round
SHARE, MOST = 0.2, 2000  # of the labelled samples are held out
BATCH = 1000  # held-out samples that are evaluated at once

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)
ALPHAS = (0.5, 0.9, 1.0)
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the default peak learning rate
LOSSES = ("kl", "js", "mse", "correlation")

Fit = Callable[[TrainConfig, Accelerator, Sequence[JoinedData], None], list[Student]]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """Samples that no student is trained on, with their labels (n,)."""

    part: JoinedData
    labels: Indices


def tuned(
    asked: TrainConfig,
    config: TrainConfig,
    accelerator: Accelerator,
    parts: Sequence[JoinedData],
    settings: Mapping[str, Any],
    fit: Fit,
) -> tuple[TrainConfig, list[JoinedData]]:
    """Like tune(), with the record in the output folder.

    Args:
        settings: what must be the same for the record of an earlier run to count, as JSON.

    Raises:
        Interrupted: the user stopped it.
        SettingsError: the user left nothing open, or there is nothing to hold out.
    """
    main = accelerator.is_main_process
    path = config.out / NAME
    rounds = [TuningRecord.read(path, settings).rounds if main else []]
    broadcast_object_list(rounds)
    record = TuningRecord(path if main else None, settings, rounds[0])
    try:
        return tune(asked, config, accelerator, parts, record, fit)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped while settings were tried; the same command continues after the last round"
        ) from None


def tune(
    asked: TrainConfig,
    config: TrainConfig,
    accelerator: Accelerator,
    parts: Sequence[JoinedData],
    record: TuningRecord,
    fit: Fit,
) -> tuple[TrainConfig, list[JoinedData]]:
    """Choose the settings of all students that the user left open.

    Students that differ only in the seed get the same settings.

    Args:
        asked: the settings as the user gave them.
        config: the same, with the defaults filled in.
        parts: the joined data of the run.
        record: the scores of earlier rounds, to which those of new ones are added.
        fit: the training loop.

    Returns:
        The settings of the run, and its joined data with the soft targets that they need.

    Raises:
        SettingsError: the user left nothing open, or there is nothing to hold out.
    """
    trained, held_out = split(parts, config.seed)
    chosen: dict[StudentConfig, dict[str, Any]] = {}
    done = 0  # rounds
    for student, default in zip(asked.students, config.students, strict=True):
        if _without_seed(student) in chosen:
            continue
        tried = candidates(student, default, asked, parts)
        scores: list[list[Score]] = [[] for _ in tried]
        live = list(range(len(tried)))  # the default first, which takes part in all rounds
        for count, epochs in rounds(len(tried), config.epochs):
            live = [0, *sorted(live[1:], key=lambda n: scores[n][-1].errors if scores[n] else 0)]
            live = live[:count]
            students = [dataclasses.replace(default, **tried[number]) for number in live]
            if accelerator.is_main_process:
                inform(f"tuning: {count} settings of {default.student}, {epochs:.2g} epochs each")
            if done == len(record.rounds) or len(record.rounds[done]) != count:
                del record.rounds[done:]
                record.add(run_round(config, accelerator, trained, held_out, students, epochs, fit))
            for number, score in zip(live, record.rounds[done], strict=True):
                scores[number].append(score)
            done += 1
        best = best_of([scores[number][-1] for number in live])
        chosen[_without_seed(student)] = tried[live[best]]
        if accelerator.is_main_process:
            samples = sum(len(part.labels) for part in held_out)
            inform(summary(tried, scores, live[best], samples))
    students = [
        dataclasses.replace(default, **chosen[_without_seed(student)])
        for student, default in zip(asked.students, config.students, strict=True)
    ]
    config = dataclasses.replace(config, students=students, given_names=asked.names())
    return config, with_targets(parts, config, accelerator.device)


def candidates(
    student: StudentConfig, default: StudentConfig, asked: TrainConfig, parts: Sequence[JoinedData]
) -> list[dict[str, Any]]:
    """The settings to try, by field: the defaults, then up to N - 1 others drawn at random.

    Raises:
        SettingsError: the user left nothing open.
    """
    caches = [part.cache for part in parts if part.cache]
    axes: dict[str, Sequence[Any]] = {}
    soft = asked.soft_weight(student) > 0
    sampled = any(isinstance(cache.header.encoding, Sampled) for cache in caches)
    if soft and student.temperature is None and not sampled:
        axes["temperature"] = TEMPERATURES
    if student.alpha is None and any(bool((part.labels() >= 0).any()) for part in parts):
        axes["alpha"] = ALPHAS
    if soft and student.loss is None:
        kinds = {type(cache.header.encoding) for cache in caches}
        without = {"mse"} if kinds & {Sampled, Packed, TopK} else set()
        without |= {"correlation"} if kinds & {Sampled, Packed} else set()
        axes["loss"] = [loss for loss in LOSSES if loss not in without]
    if student.learning_rate is None:
        axes["learning_rate"] = [rate * default.peak_learning_rate for rate in RATES]
    defaults = {
        "temperature": default.temperature,
        "alpha": asked.soft_weight(default),
        "loss": default.soft_loss,
        "learning_rate": default.peak_learning_rate,
    }
    first = {name: defaults[name] for name in axes}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    others = [point for point in points if point != first]
    if not others or asked.tune is None:
        raise SettingsError(
            f"--tune has nothing to choose for {student.student}: temperature, alpha, loss and lr are given; "
            "leave one of them out"
        )
    order = np.random.default_rng(asked.seed).permutation(len(others))
    return [first, *(others[number] for number in order[: asked.tune - 1])]


def rounds(count: int, epochs: int) -> list[tuple[int, float]]:
    """How many settings are tried in each round, and for how many epochs, so that each costs the same."""
    counts = [count]
    while counts[-1] > KEEP:
        counts.append(math.ceil(counts[-1] / KEEP))
    return [(count, COST * epochs / len(counts) / count) for count in counts]


def split(parts: Sequence[JoinedData], seed: int) -> tuple[list[JoinedData], list[HeldOut]]:
    """The samples to train on, and those to count errors on: a share of the labelled ones, at random.

    If no sample has a label, the teacher's top class is taken for one.

    Raises:
        SettingsError: there are too few samples, or mixed ones without a label.
    """
    labels = [part.labels() for part in parts]
    if all(bool((part_labels < 0).all()) for part_labels in labels):
        labels = [_top_classes(part) for part in parts]
    offsets = np.cumsum([0, *map(len, parts)])
    labelled = np.flatnonzero(np.concatenate(labels) >= 0)
    count = min(int(SHARE * len(labelled)), MOST)
    if count < 2:
        raise SettingsError(
            f"--tune counts errors on held-out samples, and only {len(labelled)} are labelled; expected 10 "
            "or more: leave --tune out"
        )
    held = np.zeros(offsets[-1], bool)
    held[np.random.default_rng(seed).permutation(labelled)[:count]] = True
    trained, held_out = [], []
    for part, part_labels, start in zip(parts, labels, offsets, strict=False):
        mask = held[start : start + len(part)]
        trained.append(_take(part, np.flatnonzero(~mask)))
        if mask.any():
            held_out.append(HeldOut(_take(part, np.flatnonzero(mask)), part_labels[mask]))
    return trained, held_out


def run_round(
    config: TrainConfig,
    accelerator: Accelerator,
    parts: Sequence[JoinedData],
    held_out: Sequence[HeldOut],
    students: Sequence[StudentConfig],
    epochs: float,
    fit: Fit,
) -> list[Score]:
    """Train students on the same batches, and score each on the held-out samples, the default first.

    Args:
        epochs: may be a fraction: then each epoch has only a part of the samples.
    """
    whole = math.ceil(epochs)
    share = epochs / whole
    some = [
        _take(part, np.random.default_rng(config.seed).permutation(len(part))[: math.ceil(share * len(part))])
        for part in parts
    ]  # fmt: skip
    config = dataclasses.replace(
        config, students=students, epochs=whole, baseline=False, patience=None, eval_data=None,
        tensorboard=False, given_names=(), out=config.out / FOLDER,
    )  # fmt: skip
    try:
        trained = fit(config, accelerator, with_targets(some, config, accelerator.device), None)
        wrong = np.concatenate(
            [errors_of(trained, part, accelerator.device) for part in held_out], 1
        )
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(config.out, ignore_errors=True)
    scores = [Score(int(row.sum()), int((row != wrong[0]).sum())) for row in wrong]
    broadcast_object_list(scores)  # so that all processes choose the same
    return scores


def errors_of(
    students: Sequence[Student], held_out: HeldOut, device: torch.device
) -> npt.NDArray[np.bool_]:
    """Which held-out samples each student gets wrong, (students, n); all of them if it failed.

    The samples are not augmented, apart from the user's own transform, without which they may have another
    shape.
    """
    part, count = held_out.part, len(held_out.labels)
    wrong = np.ones((len(students), count), np.bool_)
    models = [None if student.failed else student.final_model.eval() for student in students]
    for start in range(0, count, BATCH):
        rows = slice(start, start + BATCH)
        sample_ids = part.sample_ids[rows]
        raw, _ = part.source.fetch(part.source_indices[rows].tolist())
        inputs = part.augmentation.transformed(raw, part.views(0, sample_ids), sample_ids)
        inputs = to_float(inputs.to(device))
        for number, model in enumerate(models):
            if model is not None:
                with torch.inference_mode():
                    logits = logits_of(model(inputs))
                assert isinstance(logits, Tensor)  # it has been trained on them
                wrong[number, rows] = logits.argmax(-1).cpu().numpy() != held_out.labels[rows]
    return wrong


def best_of(scores: Sequence[Score]) -> int:
    """The number of the settings with the fewest errors, or of the first, the default, if hardly worse.

    Hardly means by no more than a standard error of the difference, as in the one-standard-error rule of
    Breiman et al., "Classification and regression trees" (1984), section 3.4.3. The variance of the
    difference of two error counts on the same samples is at most the number of samples on which they differ
    (McNemar, Psychometrika 12, 1947).
    """
    best = min(range(len(scores)), key=lambda number: scores[number].errors)
    gain = scores[0].errors - scores[best].errors
    return best if gain > math.sqrt(scores[best].differing) else 0


def summary(
    tried: Sequence[dict[str, Any]], scores: Sequence[Sequence[Score]], best: int, samples: int
) -> str:
    """A table of all settings that were tried, and a line that says which are chosen and why."""
    order = sorted(range(len(tried)), key=lambda n: (-len(scores[n]), scores[n][-1].errors))
    most = max(map(len, scores))
    names = {field.name: option_name(field) for field, _ in settings_of(StudentConfig)}
    headers = [*(names[name] for name in tried[0]), *(f"errors {n + 1}" for n in range(most)), ""]
    rows = [
        [*(_shown(value) for value in tried[n].values()), *(f"{s.errors:,}" for s in scores[n]),
         *([""] * (most - len(scores[n]))), "chosen" if n == best else "default" if n == 0 else ""]
        for n in order
    ]  # fmt: skip
    table = tabulate(rows, headers=headers, disable_numparse=True, stralign="right")
    settings = ", ".join(f"{names[name]} {_shown(value)}" for name, value in tried[best].items())
    first, last = scores[0][-1], scores[best][-1]
    reason = f"{last.errors:,} errors on {samples:,} held-out samples"
    if best:
        noise = math.sqrt(last.differing)
        gain = first.errors - last.errors
        reason += f", {gain:,} fewer than the defaults (standard error {noise:.0f})"
    else:
        reason += "; nothing is better than the defaults by more than a standard error"
    return f"{table}\ntuned: {settings}: {reason}. The teacher was not needed"


def with_targets(
    parts: Sequence[JoinedData], config: TrainConfig, device: torch.device
) -> list[JoinedData]:
    """Joined data with the soft targets at the temperatures of the students."""
    temperatures = sorted(
        {
            student.temperature
            for student in config.students
            if student.temperature is not None and config.soft_weight(student) > 0
        }
    )
    return [
        dataclasses.replace(part, targets=tempered_targets(part.cache, temperatures, device))
        if part.cache
        else part
        for part in parts
    ]


def _take(part: JoinedData, rows: Indices) -> JoinedData:
    """Some samples of a data set; mixup may still choose any of its samples as a partner."""
    return dataclasses.replace(
        part, source_indices=part.source_indices[rows], sample_ids=part.sample_ids[rows]
    )


def _top_classes(part: JoinedData) -> Indices:
    """The teacher's top class of each sample in its first view, (N,)."""
    if part.cache is None or part.targets is None or part.augmentation.mixup:
        raise SettingsError(
            "--tune counts errors on held-out samples, but none has a label, and in mixed views the "
            "teacher's top class may be that of the partner; leave --tune out"
        )
    top = []
    for start in range(0, len(part), BATCH):
        rows = part.sample_ids[start : start + BATCH] - part.cache.header.first_sample
        targets = next(iter(part.targets(0, rows).values()))
        top.append(to_dense(targets).argmax(-1).cpu().numpy())
    return np.concatenate(top)


def _without_seed(config: StudentConfig) -> StudentConfig:
    return dataclasses.replace(config, seed=0)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

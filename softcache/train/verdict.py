"""What a run says last: students that did not beat their baselines, and results that cannot be right."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from softcache.models.evaluate import Evaluation, judge_evaluation
from softcache.models.spec import parse_model
from softcache.train.config import StudentConfig
from softcache.train.student import Student
from softcache.util.settings import option_name, settings_of

GUIDE = "see the guide on students"

BySeed = dict[int, Evaluation]


def verdicts(students: Sequence[Student]) -> list[str]:
    """A sentence for each distilled student that did not beat its hard-label baseline.

    Students that differ only in the seed are one student. A baseline is a student of hard labels alone
    whose other settings are the same.
    """
    baselines: dict[StudentConfig, BySeed] = {}
    distilled: dict[tuple[StudentConfig, float, float], BySeed] = {}
    for student in students:
        if student.evaluation is None:
            continue
        config = _without_seed(student.config)
        if student.alpha == 0:
            group = baselines.setdefault(config.baseline(), {})
        else:
            group = distilled.setdefault((config, student.alpha, student.temperature), {})
        group[student.config.seed] = student.evaluation
    names = _names([config for config, _, _ in distilled])
    sentences = [
        _compared(name, alpha, temperature, evaluations, baselines.get(config.baseline(), {}))
        for name, ((config, alpha, temperature), evaluations) in zip(
            names, distilled.items(), strict=True
        )
    ]
    return [sentence for sentence in sentences if sentence]


def _compared(
    name: str, alpha: float, temperature: float, student: BySeed, baseline: BySeed
) -> str | None:
    """The sentence about one student; None if it beat its baseline, or has none."""
    if not baseline:
        return None
    common = sorted(student.keys() & baseline.keys())
    ours, theirs = (
        [group[seed] for seed in common or sorted(group)] for group in (student, baseline)
    )
    losses = [[_log_perplexity(e) for e in evaluations] for evaluations in (ours, theirs)]
    if all(loss is not None for group in losses for loss in group):
        return _compared_losses(name, alpha, temperature, losses)
    means = [statistics.fmean(e.errors for e in evaluations) for evaluations in (ours, theirs)]
    more = means[0] - means[1]
    if more < 0:
        return None
    if len(common) > 1:
        differences = [a.errors - b.errors for a, b in zip(ours, theirs, strict=True)]
        noise = statistics.stdev(differences) / math.sqrt(len(differences))
    else:
        # the two error counts are binomial, and at most independent
        noise = math.sqrt(sum(_variance(evaluations) for evaluations in (ours, theirs)))
    seeds = f" on average over {len(common)} seeds" if len(common) > 1 else ""
    excess = f"{_count(more)} more" if more else "as many"
    return (
        f"{name} makes {_count(means[0])} errors{seeds}, its hard-label baseline {_count(means[1])}: "
        f"{excess} (standard error {_count(noise)}). Try {_advice(alpha, temperature)}; {GUIDE}"
    )


def _log_perplexity(evaluation: Evaluation) -> float | None:
    """The mean loss of a language model in nats; None for other models."""
    perplexity = getattr(evaluation.scores, "perplexity", None)
    return None if perplexity is None else math.log(perplexity)


def _compared_losses(
    name: str, alpha: float, temperature: float, losses: Sequence[Sequence[float | None]]
) -> str | None:
    """The sentence about one student of tokens; None if its mean loss is below its baseline's."""
    ours, theirs = (statistics.fmean(loss or 0.0 for loss in group) for group in losses)
    if ours < theirs:
        return None
    return (
        f"{name} reaches perplexity {math.exp(ours):,.2f}, its hard-label baseline {math.exp(theirs):,.2f}. "
        f"Try {_advice(alpha, temperature)}; {GUIDE}"
    )


def _variance(evaluations: Sequence[Evaluation]) -> float:
    """The binomial variance of the mean number of errors."""
    return sum(e.errors * e.accuracy for e in evaluations) / len(evaluations) ** 2


def _advice(alpha: float, temperature: float) -> str:
    """The settings to try next, other than the present ones."""
    temperatures = [str(value) for value in (1, 2) if value != temperature]
    larger_alpha = ["a larger --alpha"] if alpha < 1 else []
    options = [f"--temperature {' or '.join(temperatures)}", *larger_alpha]
    return f"{', '.join(options)} or more epochs"


def _count(value: float) -> str:
    """A mean number of errors: one decimal where it is small and not whole."""
    return f"{value:,.0f}" if value == round(value) or value >= 20 else f"{value:,.1f}"


def _without_seed(config: StudentConfig) -> StudentConfig:
    """The settings with the defaults filled in, and the seed left out."""
    return dataclasses.replace(
        config,
        seed=0,
        learning_rate=config.peak_learning_rate,
        weight_decay=config.effective_weight_decay,
    )


def _names(configs: Sequence[StudentConfig]) -> list[str]:
    """`distilled mlp:32` for each, with the settings in which it differs from the others."""
    fields = [
        (field.name, option_name(field))
        for field, _ in settings_of(StudentConfig)
        if field.name != "student" and len({getattr(config, field.name) for config in configs}) > 1
    ]
    names = []
    for config in configs:
        options = [f"{option}={_shown(getattr(config, name))}" for name, option in fields]
        names.append(" ".join(["distilled", parse_model(config.student).public_name, *options]))
    return names


def _shown(value: object) -> str:
    if value is None:
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def impossible_results(students: Sequence[Student], class_names: Sequence[str]) -> list[str]:
    """A sentence for each student whose predictions do not fit the labels of the evaluation data.

    Args:
        class_names: names of the classes, for messages; empty for their numbers.
    """
    sentences = []
    for student in students:
        if student.evaluation is not None:
            names = class_names or [str(number) for number in range(student.classes)]
            who = f"the student {student.name!r}"
            sentences += judge_evaluation(who, student.evaluation, names)
    return sentences

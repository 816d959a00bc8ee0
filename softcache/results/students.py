"""Students of a report: runs that differ only in their seed, measured, next to their baselines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softcache.cache.verdict import judge
from softcache.data.source import Source
from softcache.models.evaluate import evaluate
from softcache.models.evaluate_rows import evaluate_rows, row_model
from softcache.models.scores import Scores, scores_from, with_teacher
from softcache.models.weights import parameter_count
from softcache.results.eval_data import eval_data_for
from softcache.results.metrics import CPU, Quality, count_macs, measure_quality, time_runs
from softcache.train.config import TrainConfig
from softcache.train.options import train_settings
from softcache.train.run_folder import Run
from softcache.util.settings import option_name, settings_of

SOFT_SETTINGS = ("alpha", "temperature", "loss")  # in which a student and its baseline differ

SAMPLES_PER_CLASS = 10  # of fewer, some other order of the classes always fits better by chance

SIGMAS = 2.0  # standard errors that a gain has to exceed to count


@dataclass(frozen=True)
class Measurement:
    """One run.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulate operations for one sample.
        seconds: how long single runs on one sample took, on the CPU.
        error: share of test errors; None if none was counted.
        test_samples: number of samples that the errors were counted on, or 0.
        quality: what was measured on the report's own evaluation data, if it has any.
        warnings: what cannot be right about it.
    """

    parameters: int
    macs: int
    seconds: Sequence[float]
    error: float | None
    test_samples: int
    quality: Quality | None = None
    warnings: Sequence[str] = ()
    scores: Scores | None = None


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (0 for a single value), smallest and largest of some values."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, min(values), max(values), len(values))


@dataclass(frozen=True)
class Gain:
    """How much more accurate a student is than its baseline, as a share of the test samples.

    Attributes:
        mean: mean difference in accuracy, over the seeds that both have if there are any.
        noise: standard error of the mean: over several seeds from their differences, for one seed from the
            numbers of test errors, as if they were independent.
        seeds: number of differences.
    """

    mean: float
    noise: float
    seeds: int

    @property
    def beats(self) -> bool:
        """Whether the student is better at all."""
        return self.mean > 0

    @property
    def certain(self) -> bool:
        """Whether the difference exceeds what chance explains."""
        return abs(self.mean) > SIGMAS * self.noise


@dataclass
class Student:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: the specification of the student, and the settings in which it differs from others.
        hard: whether it was trained on hard labels alone.
        runs: the runs by name.
        measured: what was measured of each run, by name.
        baseline: the same student trained on hard labels, if there is one.
    """

    label: str
    hard: bool
    runs: Mapping[str, Run]
    measured: dict[str, Measurement] = field(default_factory=dict)
    baseline: Student | None = None

    @property
    def spec(self) -> str:
        """The specification of the student's model."""
        return str(next(iter(self.runs.values())).facts["settings"]["student"])

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs, without repeats."""
        return sorted({_seed(run) for run in self.runs.values()})

    @property
    def parameters(self) -> int:
        """Number of parameters, of the first run."""
        return next(iter(self.measured.values())).parameters

    @property
    def macs(self) -> int:
        """MACs for one sample, of the first run."""
        return next(iter(self.measured.values())).macs

    @property
    def seconds(self) -> list[float]:
        """Times of all its runs on one sample, sorted."""
        return sorted(time for one in self.measured.values() for time in one.seconds)

    def accuracy_by_seed(self) -> dict[int, float]:
        """Share of correct test samples by seed; empty if none were counted."""
        by_seed: dict[int, list[float]] = {}
        for name, run in self.runs.items():
            error = self.measured[name].error
            if error is not None:
                by_seed.setdefault(_seed(run), []).append(1 - error)
        return {seed: statistics.fmean(values) for seed, values in sorted(by_seed.items())}

    def accuracy(self) -> Spread | None:
        """Accuracy over the seeds; None if no errors were counted."""
        values = list(self.accuracy_by_seed().values())
        return Spread.of(values) if values else None

    def ece(self) -> Spread | None:
        """Expected calibration error over the runs; None unless the report has evaluation data."""
        values = [one.quality.calibration.error for one in self.measured.values() if one.quality]
        return Spread.of(values) if values else None

    def gain(self) -> Gain | None:
        """How much it gained over its baseline; None without a baseline, or without test errors."""
        if self.baseline is None:
            return None
        ours, baseline = self.accuracy_by_seed(), self.baseline.accuracy_by_seed()
        if not ours or not baseline:
            return None
        common = sorted(ours.keys() & baseline.keys())
        if len(common) > 1:
            gains = Spread.of([ours[seed] - baseline[seed] for seed in common])
            return Gain(gains.mean, gains.deviation / math.sqrt(gains.count), gains.count)
        if common:
            ours, baseline = ({common[0]: values[common[0]]} for values in (ours, baseline))
        means = [statistics.fmean(values.values()) for values in (ours, baseline)]
        samples = max(1, min(m.test_samples for m in self.measured.values() if m.error is not None))
        noise = math.sqrt(sum(mean * (1 - mean) for mean in means) / samples)
        return Gain(means[0] - means[1], noise, 1)


def group_runs(runs: Mapping[str, Run]) -> list[Student]:
    """Students in the order of `runs`; those that share a baseline are together, the baseline last.

    Runs are one student if they differ only in their seed and in settings that do not affect the result.
    A baseline is a student of hard labels alone that otherwise has the same settings.
    """
    groups: dict[tuple[Any, ...], dict[str, Run]] = {}
    for name, run in runs.items():
        groups.setdefault(_settings_key(run, hard=_is_hard(run)), {})[name] = run
    labels = _labels([next(iter(members.values())) for members in groups.values()])
    students = {
        key: Student(label, _is_hard(next(iter(members.values()))), members)
        for (key, members), label in zip(groups.items(), labels, strict=True)
    }
    for student in students.values():
        if not student.hard:
            key = _settings_key(next(iter(student.runs.values())), hard=True)
            student.baseline = students.get(key)
    ordered: dict[int, list[Student]] = {}  # by baseline, or by student where there is none
    for student in students.values():
        ordered.setdefault(id(student.baseline or student), []).append(student)
    return [
        student
        for members in ordered.values()
        for student in sorted(members, key=lambda member: member.hard)
    ]


def measure_students(
    students: Sequence[Student],
    specs: Sequence[str],
    evaluation: Source | None,
    *,
    same_classes: bool = False,
) -> None:
    """Measure all runs of `students` in place.

    Args:
        specs: specifications of students whose code is the user's own, with the path to their file.
        evaluation: labelled data for accuracy and calibration; without them, the accuracy is that of
            each run's own evaluation.
        same_classes: the classes of the evaluation data are those of the students in the same order, whatever
            they are called.

    Raises:
        SoftcacheError: a student cannot be built, or the data do not fit it.
    """
    runs = {name: run for student in students for name, run in student.runs.items()}
    models = {name: run.model(specs) for name, run in runs.items()}
    seconds = time_runs(models, {name: run.example(1) for name, run in runs.items()})
    for student in students:
        for name, run in student.runs.items():
            quality, error, samples = None, None, 0
            warnings: list[str] = []
            scores = scores_from(run.facts)
            if evaluation is not None and run.multi_label:
                aligned = eval_data_for(run, evaluation, same_classes=same_classes)
                result = evaluate(models[name], aligned, run.classes, CPU, multi_label=True)
                error, samples, scores = 1 - result.accuracy, result.samples, result.scores
            elif evaluation is not None and run.unit is not None:
                aligned = eval_data_for(run, evaluation, same_classes=same_classes)
                rows = row_model(models[name], run.classes)
                result = evaluate_rows(rows, aligned, run.classes, CPU)
                error, samples = 1 - result.accuracy, result.samples
                scores = with_teacher(result.scores, scores)
            elif evaluation is not None:
                aligned = eval_data_for(run, evaluation, same_classes=same_classes)
                quality = measure_quality(models[name], aligned, run.classes)
                error, samples = quality.error, quality.samples
                complete = len(run.class_names) == run.classes
                names = run.class_names if complete else list(map(str, range(run.classes)))
                if samples >= SAMPLES_PER_CLASS * run.classes:
                    warnings = judge(f"the student in {name}", quality.predictions, names)
            elif "errors" in run.facts:
                samples = int(run.facts["samples"])
                error = run.facts["errors"] / samples
            student.measured[name] = Measurement(
                parameter_count(models[name]),
                count_macs(models[name], run.example(1)),
                seconds[name],
                error,
                samples,
                quality,
                warnings,
                scores,
            )


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch: its mean over the runs of a student, and its smallest and largest value."""

    label: str
    epochs: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def loss_curve(student: Student) -> Curve:
    """The training loss of a student by epoch."""
    return _curve(student, lambda line: line.get("total"))


def error_curve(student: Student) -> Curve:
    """The test error of a student in percent by epoch, where it was counted."""
    return _curve(
        student,
        lambda line: 100 * line["errors"] / line["samples"] if "errors" in line else None,
    )


def _curve(student: Student, value_of: Any) -> Curve:  # noqa: ANN401  # a function of a line
    by_epoch: dict[int, list[float]] = {}
    for run in student.runs.values():
        for line in run.metrics:
            value = value_of(line)
            if value is not None and math.isfinite(value):
                by_epoch.setdefault(int(line["epoch"]), []).append(float(value))
    epochs = sorted(by_epoch)
    spreads = [Spread.of(by_epoch[epoch]) for epoch in epochs]
    return Curve(
        student.label,
        epochs,
        [spread.mean for spread in spreads],
        [spread.low for spread in spreads],
        [spread.high for spread in spreads],
    )


def _seed(run: Run) -> int:
    return int(run.facts["settings"].get("seed", 0))


def _is_hard(run: Run) -> bool:
    return float(run.facts["alpha"]) == 0


def _ignored_settings() -> set[str]:
    """Settings by which two runs may differ and still be one student."""
    without_effect = {
        setting.name for setting, facts in settings_of(TrainConfig) if not facts.affects_result
    }
    return without_effect | {"seed", "baseline", "cache"}  # the caches count by their content


def _settings_key(run: Run, *, hard: bool) -> tuple[Any, ...]:
    """What two runs have in common if they are the same student.

    Args:
        hard: compare them as if they were trained on hard labels alone.
    """
    settings = {
        name: value
        for name, value in run.facts["settings"].items()
        if name not in _ignored_settings() and name not in SOFT_SETTINGS
    }
    contents = run.facts.get("content_ids") or []
    caches = run.facts["settings"].get("cache") or []
    settings["cache"] = contents if all(contents) else caches
    key = tuple((name, repr(value)) for name, value in sorted(settings.items()))
    if hard:
        return ("hard", *key)
    soft = (run.facts["alpha"], run.facts["temperature"], run.facts["settings"]["loss"])
    return ("soft", *soft, *key)


def _labels(runs: Sequence[Run]) -> list[str]:
    """A label for each of several students: its specification and what tells it from the others."""
    options = {setting.name: option_name(setting) for setting, _ in train_settings()}
    ignored = _ignored_settings() - {"cache"}

    def settings(run: Run) -> dict[str, Any]:
        soft = {name: run.facts[name] for name in ("alpha", "temperature")}
        return {**run.facts["settings"], **soft}

    labels = []
    for run in runs:
        peers = [
            settings(other)
            for other in runs
            if _is_hard(other) == _is_hard(run)
            and settings(other)["student"] == settings(run)["student"]
        ]
        differing = [
            f"{options.get(name, name)}={_shown(value)}"
            for name, value in settings(run).items()
            if name not in ignored
            and not (_is_hard(run) and name in SOFT_SETTINGS)
            and len({repr(peer.get(name)) for peer in peers}) > 1
        ]
        hard = ["hard labels"] if _is_hard(run) else []
        labels.append(", ".join([settings(run)["student"], *differing, *hard]))
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: number + 1].count(label)})"
        for number, label in enumerate(labels)
    ]


def _shown(value: object) -> str:
    if value is None:
        return "default"
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)

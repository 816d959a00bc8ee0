"""What a report concludes, in a few sentences: the teacher, the file, and each student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softcache.cache import Cache, Sampled
from softcache.cache.verdict import judge
from softcache.results.knowledge import Knowledge, ViewDivergence
from softcache.results.students import Student
from softcache.train.verdict import GUIDE

CALIBRATED = 0.02  # gap between confidence and agreement that counts as none
SUSPICIOUS = 0.25  # gap between accuracy and agreement that suggests a mistake in the data
SHARP, FLAT = 1e-3, 0.98  # shares of log C below and above which an entropy says little
CONVERGED = 0.05  # relative growth of the divergence below which the last view added little
MOST_STUDENTS = 6  # that are described one by one

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Verdict:
    """Paragraphs by heading; `students` has a sentence for each, and `warnings` come first."""

    warnings: list[str] = field(default_factory=list)
    paragraphs: list[tuple[str, str]] = field(default_factory=list)
    students: list[str] = field(default_factory=list)
    students_summary: str = ""


def short_number(value: float) -> str:
    """A small positive number in a few characters, with its power of ten written out below 0.001."""
    if not math.isfinite(value):
        return "unknown"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} \N{MULTIPLICATION SIGN} 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def percent(share: float) -> str:
    """A share in percent, with enough digits to tell errors from perfection."""
    if share in (0, 1):
        return f"{share:.0%}"
    digits = 2 if share >= 0.99 or share < 0.01 else 1
    return f"{share:.{digits}%}"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, without its sign."""
    count = f"{100 * abs(difference):.2f}"
    return f"{count} percentage point{'' if count == '1.00' else 's'}"


def file_size(count: int) -> str:
    """A number of bytes in the largest unit that leaves at least 1."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,} bytes"


def teacher_name(teachers: Sequence[Mapping[str, Any]]) -> str:
    """The name of the only teacher, or of all in an ensemble."""
    names = [str(teacher["name"]) for teacher in teachers]
    if len(names) == 1:
        return names[0]
    return f"an ensemble of {', '.join(names[:-1])} and {names[-1]}" if names else "the teacher"


def teacher_sentences(cache: Cache, knowledge: Knowledge) -> str:
    """What the teacher knows, and how sure it is."""
    header = cache.header
    sentences = [_introduction(header.teachers, header.evaluation)]
    agreement, confidence = _agreement(cache, knowledge), _confidence(cache, knowledge)
    agrees = f"its top class is the label in {percent(agreement or 0)} of cases"
    sure = f"its mean top-1 probability at T = 1 is {percent(confidence or 0)}"
    if agreement is not None and confidence is not None:
        gap = confidence - agreement
        judgement = "it is about as sure as it is right"
        if gap > CALIBRATED:
            judgement = f"it is surer than it is right, by {points(gap)}"
        elif gap < -CALIBRATED:
            judgement = f"it is less sure than it is right, by {points(gap)}"
        sentences.append(f"On the cached samples {agrees}, and {sure}: {judgement}.")
    elif agreement is not None or confidence is not None:
        sentences.append(f"On the cached samples {sure if agreement is None else agrees}.")
    drawn = isinstance(header.encoding, Sampled)
    of = "the stored draws of its soft targets" if drawn else "its soft targets"
    sentences.append(
        f"At T = {header.temperature:g} {of} have a mean entropy of "
        f"{_entropy(cache, knowledge):.3f} nats; hard labels have 0, and {header.classes:,} equally likely "
        f"classes {math.log(header.classes):.3f}."
    )
    return " ".join(filter(None, sentences))


def teacher_warnings(cache: Cache, knowledge: Knowledge) -> list[str]:
    """Numbers that cannot be right, each with its likely cause."""
    header, name = cache.header, cache.path.name
    classes = [*cache.class_names, *map(str, range(len(cache.class_names), header.classes))]
    found = (header.summary or {}).get("warnings")  # which older versions did not look for
    found = found or judge("the teacher", knowledge.predictions, classes[: header.classes])
    warnings = [f"{name}: {text}." for text in found]
    agreement = _agreement(cache, knowledge)
    if not found and agreement is not None and header.evaluation:
        accuracy = 1 - header.evaluation["errors"] / header.evaluation["samples"]
        if accuracy - agreement > SUSPICIOUS:
            warnings.append(
                f"{name}: the teacher classifies {percent(accuracy)} of its evaluation data correctly, but "
                f"its top class is the label of only {percent(agreement)} of the cached samples. Check their "
                "labels, and that the augmentation leaves them recognisable."
            )
    entropy, uniform = _entropy(cache, knowledge), math.log(header.classes)
    if entropy < SHARP * uniform:
        warnings.append(
            f"{name}: the soft targets have almost no entropy, so they say little more than hard labels. "
            f"Check the teacher's output, or raise T above {header.temperature:g}."
        )
    elif entropy > FLAT * uniform:
        warnings.append(
            f"{name}: the soft targets are almost uniform, so they hardly tell classes apart. Check the "
            f"teacher's output, or lower T below {header.temperature:g}."
        )
    return warnings


def _agreement(cache: Cache, knowledge: Knowledge) -> float | None:
    """Share of samples whose top class is their label, of all views if the header has a summary."""
    if knowledge.agreement is None:
        return None
    known = (cache.header.summary or {}).get("agreement")
    return knowledge.agreement if known is None else float(known)


def _confidence(cache: Cache, knowledge: Knowledge) -> float | None:
    """Mean top-1 probability at temperature 1, of all views if the header has it."""
    known = (cache.header.summary or {}).get("confidence")
    if known is not None and knowledge.agreement is not None:
        return float(known)
    return None if knowledge.top_at_one is None else float(knowledge.top_at_one.mean())


def _entropy(cache: Cache, knowledge: Knowledge) -> float:
    """Mean entropy in nats, of all views if the header has a summary."""
    return float((cache.header.summary or {}).get("entropy", knowledge.entropy.mean()))


def _introduction(
    teachers: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any] | None
) -> str:
    """Who the teacher is, and its accuracy where it was counted; empty if neither is known."""
    parameters = sum(int(teacher["parameters"]) for teacher in teachers)
    size = f" ({parameters:,} parameters)" if parameters else ""
    sentences = [f"The teacher is {teacher_name(teachers)}{size}."] if teachers else []
    if evaluation:
        errors, samples = evaluation["errors"], evaluation["samples"]
        sentences.append(
            f"It classifies {percent(1 - errors / samples)} of {evaluation['data']} correctly "
            f"({errors:,} errors in {samples:,} samples)."
        )
    return " ".join(sentences)


def file_sentences(cache: Cache, views: ViewDivergence | None) -> str:
    """What the file keeps of the teacher: encoding, bytes a row, KL, and what its views add."""
    header = cache.header
    dense = 2 * header.classes
    encoding = f"encoding {header.encoding.name}; dense float16 takes {dense:,}"
    if header.encoding.name == "dense":
        encoding = "dense float16"
    elif header.bytes_per_row == dense:
        encoding = f"encoding {header.encoding.name}, as many as dense float16 takes"
    count = f"{header.views:,} views" if header.views > 1 else "one view"
    sentences = [
        f"{cache.path.name} stores {count} of {header.samples:,} samples in {file_size(header.file_bytes)}: "
        f"{header.bytes_per_row:,} bytes a row for {header.classes:,} classes, "
        f"{encoding}."
    ]
    fidelity = (header.summary or {}).get("fidelity")
    if isinstance(fidelity, dict) and "mean" in fidelity:
        sampled = isinstance(header.encoding, Sampled)
        direction = "KL(stored ‖ teacher)" if sampled else "KL(teacher ‖ stored)"
        spread = (
            f" (99th percentile {short_number(max(0.0, float(fidelity['p99'])))})"
            if "p99" in fidelity
            else ""
        )
        mean = short_number(max(0.0, float(fidelity["mean"])))
        sentences.append(
            f"{direction} at T = {header.temperature:g} is {mean} nats on average{spread}."
        )
    else:
        sentences.append("The KL of the stored rows from the teacher was not measured.")
    if views is not None and views.divergence[-1] > 0:
        last, before = float(views.divergence[-1]), float(views.divergence[-2])
        sentences.append(
            f"The soft targets of a sample differ between its views by {short_number(last)} nats on "
            f"average, and its top class changes in {percent(float(views.changed[-1]))} of samples"
            + (
                "; the last view added little."
                if len(views.divergence) > 2 and last - before < CONVERGED * last
                else "."
            )
        )
    return " ".join(sentences)


def teacher_from_runs(facts: Mapping[str, Any]) -> str:
    """What a run's config.json knows of the teacher; empty if it knows none."""
    teachers = facts.get("teachers") or []
    return _introduction(teachers, facts.get("teacher_evaluation")) if teachers else ""


def student_sentence(student: Student) -> str:
    """How accurate a student is, and what it gained over its baseline."""
    accuracy, gain = student.accuracy(), student.gain()
    if accuracy is None:
        return f"{student.label}: accuracy unknown; add --eval-data with labelled samples to measure it."
    reached = f"{student.label} is {_spread(student)} accurate"
    if student.baseline is None or gain is None:
        return f"{reached}; it has no hard-label baseline to compare with (softcache train --baseline)."
    against = f"its hard-label baseline ({_spread(student.baseline)})"
    seeds = f"over {gain.seeds} seeds" if gain.seeds > 1 else "with one seed"
    noise = f"standard error {100 * gain.noise:.2f}"
    if not gain.beats:
        chance = "" if gain.certain else ", a difference that chance can explain"
        if gain.mean == 0:
            return f"{reached}. It did not beat {against}: it is equally accurate."
        return (
            f"{reached}. It did not beat {against}: it is {points(gain.mean)} less accurate {seeds} ({noise})"
            f"{chance}."
        )
    chance = "" if gain.certain else "; chance can explain a difference this small"
    return f"{reached}: it gained {points(gain.mean)} over {against} {seeds} ({noise}){chance}."


def students_verdict(students: Sequence[Student]) -> tuple[str, list[str]]:
    """A summary of all students, and a sentence for each, or for the most telling ones of many."""
    distilled = [student for student in students if not student.hard]
    gains = {id(student): student.gain() for student in distilled}
    compared = [student for student in distilled if gains[id(student)]]
    if not distilled:
        return "All runs learned from hard labels alone, so there is no gain to report.", []
    ranked = sorted(compared, key=lambda s: -_mean_gain(s))
    better = [s for s in ranked if (gain := gains[id(s)]) and gain.beats and gain.certain]
    worse = [s for s in ranked if (gain := gains[id(s)]) and not gain.beats]
    unclear = len(ranked) - len(better) - len(worse)
    runs = sum(len(student.runs) for student in distilled)
    counts = f"{len(distilled)} distilled student{'' if len(distilled) == 1 else 's'}"
    counts += f" ({runs} {'run' if runs == 1 else 'runs'})"
    if not compared:
        summary = f"{counts}; none can be compared with a hard-label baseline."
    elif len(compared) == 1:
        verb = "beats" if better else "did not beat" if worse else "may beat"
        summary = f"{counts}: it {verb} its hard-label baseline."
    else:
        total = len(compared)
        counted = [
            (len(better), "beat their baselines", "all beat their baselines"),
            (
                unclear,
                "gained no more than chance can explain",
                "none gained more than chance can explain",
            ),
            (len(worse), "did not beat their baselines", "none beat their baselines"),
        ]
        listed = [
            every if count == total else f"{count} {some}"
            for count, some, every in counted
            if count
        ]
        summary = f"{counts}: {', '.join(listed)}."
    if worse:
        summary += f" Try another temperature, a larger alpha or more epochs; {GUIDE}."
    if any((accuracy := student.accuracy()) and accuracy.count > 1 for student in students):
        summary += " Accuracies are means over seeds ± their standard deviation."
    if len(distilled) <= MOST_STUDENTS:
        return summary, [student_sentence(student) for student in distilled]
    telling = ranked[:2] + [s for s in ranked[2:] if s in worse][: MOST_STUDENTS - 2]
    return f"{summary} The best gains, and students without one:", [
        student_sentence(student) for student in telling
    ]


def _mean_gain(student: Student) -> float:
    gain = student.gain()
    return gain.mean if gain else -math.inf


def _spread(student: Student) -> str:
    """An accuracy as mean ± standard deviation over the seeds."""
    accuracy = student.accuracy()
    if accuracy is None:
        return "of unknown accuracy"
    if accuracy.count == 1:
        return f"{accuracy.mean:.2%}"
    return f"{100 * accuracy.mean:.2f} ± {100 * accuracy.deviation:.2f}%"

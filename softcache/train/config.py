"""The settings of a training run: per student, and shared by all students."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.cache.encodings import MAX_TEMPERATURE
from softcache.errors import SettingsError
from softcache.models.spec import parse_model
from softcache.util.settings import check_range, option_name, setting, settings_of

BATCH_SIZE = 128  # the default
MAX_LEARNING_RATE = 1e6
LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.05}
WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 5e-4}
SCHEDULES = ("cosine", "constant")
SAMPLINGS = ("uniform", "balanced")
LABELS = ("data", "cache")
PRECISIONS = ("fp32", "bf16", "fp16")
MAX_TRIED = 1024  # settings of a student, with --tune
MAX_NAME_PART = 40  # characters of one setting in the name of a folder

STUDENT, DATA, LOSS, OPTIMIZATION = "Students", "Data", "Loss", "Optimization"
RESOURCES, OUTPUT = "Resources", "Output"


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The settings of one student."""

    student: str = setting(
        help="The student. Repeat the option to train several on the same batches, each in its own folder.",
        group=STUDENT,
        metavar="SPEC",
    )
    init: Path | None = setting(
        None, help="Weights to start from.", group=STUDENT, metavar="WEIGHTS"
    )
    alpha: float | None = setting(
        None,
        help="Weight of the soft targets in the loss, 0 to 1.",
        group=LOSS,
        default_text="1; 0.9 with --class-weights or --label-smoothing",
        at_least=0,
        at_most=1,
    )
    temperature: float | None = setting(
        None,
        help="Temperature of the soft targets.",
        group=LOSS,
        default_text="0.5 for augmented views; else 0.5 to 4, by the entropy of the soft targets",
        above=0,
        at_most=MAX_TEMPERATURE,
    )
    loss: str | None = setting(
        None,
        help="Loss on the soft targets: kl, reverse_kl, js, mse, correlation or dkd:BETA.",
        group=LOSS,
        metavar="NAME",
        default_text="kl",
    )
    label_smoothing: float = setting(
        0.0,
        help="Share of each hard label that is spread evenly over all classes.",
        group=LOSS,
        at_least=0,
        below=1,
    )
    class_weights: str | None = setting(
        None,
        help="Weights of the classes in the hard loss: balanced, or a file with one number per line.",
        group=LOSS,
        metavar="balanced|FILE",
    )
    optimizer: str = setting(
        "adamw",
        help="Optimizer; sgd uses Nesterov momentum.",
        group=OPTIMIZATION,
        choices=tuple(LEARNING_RATES),
    )
    learning_rate: float | None = setting(
        None,
        help="Peak learning rate.",
        group=OPTIMIZATION,
        option="lr",
        default_text="2e-3; 0.05 for sgd",
        above=0,
        at_most=MAX_LEARNING_RATE,
    )
    momentum: float = setting(
        0.9, help="Momentum, for sgd.", group=OPTIMIZATION, at_least=0, below=1
    )
    schedule: str = setting(
        "cosine", help="Learning rate schedule.", group=OPTIMIZATION, choices=SCHEDULES
    )
    warmup: float = setting(
        0.05, help="Share of the steps spent on warm-up.", group=OPTIMIZATION, at_least=0, below=1
    )
    weight_decay: float | None = setting(
        None,
        help="Weight decay.",
        group=OPTIMIZATION,
        default_text="0.01; 5e-4 for sgd",
        at_least=0,
    )
    max_grad_norm: float | None = setting(
        None, help="Max gradient norm; larger gradients are clipped.", group=OPTIMIZATION, above=0
    )
    micro_batches: int = setting(
        1,
        help="Number of micro-batches to split each batch into, to save memory.",
        group=OPTIMIZATION,
        at_least=1,
    )
    ema: float | None = setting(
        None,
        help="Evaluate and save an exponential moving average of the weights with this decay.",
        group=OPTIMIZATION,
        at_least=0,
        below=1,
    )
    seed: int = setting(
        0,
        help="Seed for the student's initial weights and the order of the samples.",
        group=OPTIMIZATION,
        at_least=0,
    )

    def __post_init__(self) -> None:
        from softcache.losses import parse_loss  # importing torch takes seconds

        check_range(self)
        parse_loss(self.soft_loss)

    @property
    def soft_loss(self) -> str:
        """The loss on the soft targets; the default if none is set."""
        return "kl" if self.loss is None else self.loss

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate; the optimizer's default if none is set."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]

    @property
    def effective_weight_decay(self) -> float:
        """The weight decay; the optimizer's default if none is set."""
        return WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    def baseline(self) -> StudentConfig:
        """The same student, trained on hard labels alone."""
        return dataclasses.replace(self, alpha=0.0, temperature=None, loss=None)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run.

    Attributes:
        students: settings of each student.
        caches: caches to train from, either one per data set or several of the same data set.
        seed: seed for the order of the samples.
        given_names: names of the students; made of their settings if empty.
    """

    students: Sequence[StudentConfig]
    caches: Sequence[Path] = ()
    seed: int = 0
    given_names: Sequence[str] = ()
    tune: int | None = setting(
        None,
        help="Try N settings of each student on held-out training samples, by default 16, and train with the "
        "best: temperature, alpha, loss and peak learning rate, as far as they are not given.",
        group=STUDENT,
        metavar="[N]",
        at_least=2,
        at_most=MAX_TRIED,
        flag_value=16,
    )
    baseline: bool = setting(
        False,
        help="Also train a hard-label baseline of each student, for comparison.",
        group=STUDENT,
    )
    data: Sequence[str] = setting(
        (),
        help="Training samples: one --data per CACHE, or one for all. Not needed if CACHE embeds them.",
        group=DATA,
        metavar="SPEC",
    )
    eval_data: str | None = setting(
        None,
        help="Labelled data to count errors on after each epoch.",
        group=DATA,
        metavar="SPEC",
    )
    same_classes: bool = setting(
        False,
        help="The data has the classes of CACHE in the same order, under other names.",
        group=DATA,
    )
    skip_unreadable: bool = setting(
        False, help="Leave out image files that cannot be read.", group=DATA
    )
    known_only: bool = setting(
        False,
        help="Leave out samples that CACHE does not know, instead of refusing them.",
        group=DATA,
    )
    labels: str | None = setting(
        None,
        help="Whose labels count where those of the data and of CACHE differ; by default, a difference is an "
        "error.",
        group=DATA,
        choices=LABELS,
    )
    classes: int | None = setting(
        None,
        help="Number of classes, if neither CACHE nor the data defines it.",
        group=DATA,
        at_least=2,
    )
    augment: str | None = setting(
        None,
        help="Augmentation when training without CACHE. With CACHE: all of its own augmentation, needed only "
        "if that has a callable, with the path to its file.",
        group=DATA,
        metavar="SPEC",
    )
    extra_augment: str | None = setting(
        None,
        help="Augmentation on top of the cache's own. It makes the soft targets inexact.",
        group=DATA,
        metavar="SPEC",
    )
    rotate: bool = setting(
        True,
        help="Mix the views of CACHE within each epoch; --no-rotate reads one view per epoch, for files "
        "larger than memory.",
        group=DATA,
    )
    sampling: str = setting(
        "uniform",
        help="Draw samples uniformly, or each class equally often.",
        group=DATA,
        choices=SAMPLINGS,
    )
    epochs: int = setting(20, help="Passes over the data.", group=OPTIMIZATION, at_least=1)
    batch_size: int = setting(
        BATCH_SIZE,
        help="Samples per step; of texts as tokens, see --batch-tokens.",
        group=OPTIMIZATION,
        at_least=1,
    )
    batch_tokens: int = setting(
        8192,
        help="Tokens per step, where samples are texts as tokens and --batch-size is not given.",
        group=OPTIMIZATION,
        at_least=2,
    )
    patience: int | None = setting(
        None,
        help="Stop after this many epochs without fewer errors on --eval-data, and keep the best weights.",
        group=OPTIMIZATION,
        metavar="EPOCHS",
        at_least=1,
    )
    device: str = setting(
        "auto", help="Device: auto, cpu, cuda, cuda:1, mps.", group=RESOURCES, affects_result=False
    )
    precision: str = setting(
        "fp32", help="Precision of mixed-precision training.", group=RESOURCES, choices=PRECISIONS
    )
    workers: int = setting(
        0,
        help="Worker processes that load data.",
        group=RESOURCES,
        at_least=0,
        affects_result=False,
    )
    out: Path = setting(
        help="Folder to write the run to.", group=OUTPUT, metavar="DIR", affects_result=False
    )
    checkpoint_minutes: float = setting(
        10.0,
        help="Minutes between checkpoints within an epoch; there is always one after each epoch.",
        group=OUTPUT,
        at_least=0,
        affects_result=False,
    )
    tensorboard: bool = setting(
        False,
        help="Write TensorBoard logs; needs the tensorboard extra.",
        group=OUTPUT,
        affects_result=False,
    )
    verify: bool = setting(
        True,
        help="Check every digest of CACHE before the first step.",
        group=OUTPUT,
        affects_result=False,
    )
    overwrite: bool = setting(
        False,
        help="Replace a finished run in DIR, or one that was started with other settings.",
        group=OUTPUT,
        affects_result=False,
    )

    trust_code: bool = setting(
        False,
        help="Load a .pt2 student even if the file may run code.",
        group=OUTPUT,
        affects_result=False,
    )
    strict: bool = setting(
        False,
        help="Exit with an error if a result cannot be right.",
        group=OUTPUT,
        affects_result=False,
    )

    def __post_init__(self) -> None:
        check_range(self)
        if not self.students:
            raise SettingsError("no student; name one with --student")
        if self.patience is not None and not self.eval_data:
            raise SettingsError("--patience counts errors after each epoch; add --eval-data")
        if not self.data and not self.caches:
            raise SettingsError("no data; name it with --data")
        if self.tune and not self.caches:
            raise SettingsError("--tune needs a CACHE of soft targets; name one, or leave it out")
        if self.data and len(self.data) not in (1, len(self.caches)):
            raise SettingsError(
                f"{len(self.data)} --data for {len(self.caches)} CACHE; expected one for each, in the same "
                "order, or one for all"
            )
        self.names()
        for student in self.students:
            if not self.caches and (student.alpha or student.temperature or self.baseline):
                raise SettingsError(
                    "--alpha, --temperature and --baseline need a CACHE of soft targets; name one, or "
                    "leave these options out to train on labels alone"
                )

    @property
    def tokens_of_batch(self) -> int | None:
        """The tokens of a batch of documents; None if --batch-size says how many documents it has."""
        return self.batch_tokens if self.batch_size == BATCH_SIZE else None

    def soft_weight(self, student: StudentConfig) -> float:
        """The alpha of a student: by default 1 with a cache, and 0 without.

        Next to soft targets for every sample, the labels of the same samples add nothing (Beyer et al., arXiv
        2106.05237, section 3; tests/bench/gains.py). Options of the hard loss ask for one.
        """
        if student.alpha is not None:
            return student.alpha
        if not self.caches:
            return 0.0
        return 0.9 if student.class_weights or student.label_smoothing else 1.0

    def names(self) -> list[str]:
        """Names of the students, made of the settings in which they differ; "" for a single student.

        Raises:
            SettingsError: two students would have the same name.
        """
        if self.given_names:
            return list(self.given_names)
        if len(self.students) == 1:
            return [""]
        resolved = [
            dataclasses.asdict(student)
            | {
                "alpha": self.soft_weight(student),
                "loss": student.soft_loss,
                "learning_rate": student.peak_learning_rate,
                "weight_decay": student.effective_weight_decay,
                "class_weights": student.class_weights and Path(student.class_weights).name,
            }
            for student in self.students
        ]
        differing = [
            (field.name, option_name(field))
            for field, _ in settings_of(StudentConfig)
            if len({repr(values[field.name]) for values in resolved}) > 1
        ]
        names = [
            short_name({option: values[name] for name, option in differing}) for values in resolved
        ]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise SettingsError(
                    f"two students would be called {name or 'the same'}; give each its own settings"
                )
        return names


def short_name(options: Mapping[str, Any]) -> str:
    """The values of some options in a few characters that are safe in the name of a folder."""
    parts = [
        parse_model(value).public_name
        if option == "student"
        else f"{option}={value}"[:MAX_NAME_PART]
        for option, value in options.items()
    ]
    return "".join(c if c.isalnum() or c in "-=.," else "-" for c in " ".join(parts)).strip("-.")

"""What a training is asked for: of every student, and of the run that they share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcache.errors import SettingsError
from softcache.losses import parse_loss
from softcache.models.spec import public_name

MAX_LEARNING_RATE = 1e6

LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.05}

WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 5e-4}

SCHEDULES = ("cosine", "constant")

OPTIONS = {"learning_rate": "lr"}  # a setting whose option has another name

CUT = 40  # characters of a setting in the name of a folder


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What one student is, and how it learns."""

    student: str
    alpha: float | None = None  # None: 0.9 with a cache, 0 without
    temperature: float | None = None  # None: the cache's
    loss: str = "kl"  # of the soft targets
    label_smoothing: float = 0.0  # of the cross-entropy
    optimizer: str = "adamw"
    learning_rate: float | None = None  # None: the optimizer's own of LEARNING_RATES
    momentum: float = 0.9  # of sgd
    weight_decay: float | None = None  # None: the optimizer's own of WEIGHT_DECAYS
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps in which the learning rate rises from 0
    clip: float | None = None  # norm of the gradient, at the most
    accumulate: int = 1  # parts in which a batch goes through the student
    ema: float | None = (
        None  # decay of the average of the weights, which is what is evaluated and saved
    )
    init: Path | None = None
    seed: int = 0  # of its first weights and its dropout

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        for name, choices in (
            ("optimizer", tuple(LEARNING_RATES)),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"{name} {getattr(self, name)!r} is unknown; expected one of {', '.join(choices)}"
                )
        for name, low in (("seed", 0), ("accumulate", 1)):
            if getattr(self, name) < low:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected {low} or more")
        if self.learning_rate is not None and self.learning_rate > MAX_LEARNING_RATE:
            raise SettingsError(
                f"lr is {self.learning_rate}; expected at most {MAX_LEARNING_RATE:g}"
            )
        for name, number in (
            ("temperature", self.temperature),
            ("lr", self.learning_rate),
            ("clip", self.clip),
        ):
            if number is not None and not 0 < number < math.inf:
                raise SettingsError(f"{name} is {number}; expected a number above 0")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"weight decay is {self.weight_decay}; expected 0 or more")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SettingsError(f"alpha is {self.alpha}; expected a number from 0 to 1")
        for name in ("momentum", "ema", "label_smoothing", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise SettingsError(
                    f"{name.replace('_', ' ')} is {value}; expected a number from 0 up, less than 1"
                )

    @property
    def highest_rate(self) -> float:
        """The learning rate with its default."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]

    @property
    def decay(self) -> float:
        """The weight decay with its default."""
        found = self.weight_decay
        return WEIGHT_DECAYS[self.optimizer] if found is None else found

    def twin(self) -> StudentConfig:
        """The same student, which listens to the labels alone."""
        return dataclasses.replace(self, alpha=0.0, temperature=None, loss="kl")


STUDENT_FIELDS = tuple(field.name for field in dataclasses.fields(StudentConfig))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StudentConfig):
    """Everything that decides what `train` does.

    The settings of a student are those of all; `variants` says in what each one differs.
    """

    data: str | Sequence[str]
    out: Path
    cache: Path | Sequence[Path] | None = None  # several: each with its data, or all with one
    variants: Sequence[Mapping[str, Any]] = ({},)
    eval_data: str | None = None
    epochs: int = 20
    batch_size: int = 128
    patience: int | None = None  # epochs without fewer errors after which a student stops
    augment: str | None = None  # with a cache, only its own
    extra_augment: str | None = None  # on top of the cache's, which makes its targets inexact
    baseline: bool = False
    classes: int | None = None  # None: as the cache or the data say
    device: str = "auto"
    mixed_precision: str = "no"
    workers: int = 0
    rotate: bool = True  # each sample begins with another view of the cache
    checkpoint_minutes: float = 10.0  # between two checkpoints within an epoch, at least
    tensorboard: bool = False
    verify: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value, low in (
            ("epochs", self.epochs, 1),
            ("batch size", self.batch_size, 1),
            ("workers", self.workers, 0),
            ("patience", 1 if self.patience is None else self.patience, 1),
        ):
            if value < low:
                raise SettingsError(f"{name} is {value}; expected {low} or more")
        if self.classes is not None and self.classes < 2:
            raise SettingsError(f"classes is {self.classes}; expected 2 or more")
        if self.patience is not None and not self.eval_data:
            raise SettingsError("--patience counts epochs by their errors; add --eval-data")
        if not self.checkpoint_minutes >= 0:
            raise SettingsError(
                f"checkpoint minutes is {self.checkpoint_minutes}; expected 0 or more"
            )
        if not self.data and not self.caches:
            raise SettingsError("no data; name them with --data")
        if self.data and len(self.datas) not in (1, len(self.caches)):
            raise SettingsError(
                f"{len(self.datas)} --data for {len(self.caches)} CACHE; expected one for each, in the same "
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
    def caches(self) -> list[Path]:
        return [self.cache] if isinstance(self.cache, Path) else list(self.cache or ())

    @property
    def datas(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else list(self.data)

    @property
    def students(self) -> list[StudentConfig]:
        """Each student's own settings."""
        common = {name: getattr(self, name) for name in STUDENT_FIELDS}
        return [StudentConfig(**common | dict(variant)) for variant in self.variants]

    def soft_weight(self, student: StudentConfig) -> float:
        """Alpha with its default: 0.9 with a cache, 0 without."""
        default = 0.9 if self.caches else 0.0
        return default if student.alpha is None else student.alpha

    def names(self) -> list[str]:
        """What the students are called, by the settings in which they differ; one alone has no name.

        Raises:
            SettingsError: two of them do not differ.
        """
        if len(self.variants) == 1:
            return [""]
        settings = [
            dataclasses.asdict(student)
            | {
                "alpha": self.soft_weight(student),
                "learning_rate": student.highest_rate,
                "weight_decay": student.decay,
            }
            for student in self.students
        ]
        differ = [n for n in settings[0] if len({repr(one[n]) for one in settings}) > 1]
        names = [short_name({name: one[name] for name in differ}) for one in settings]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise SettingsError(
                    f"two students would be called {name or 'the same'}; name each only once"
                )
        return names


def short_name(settings: Mapping[str, Any]) -> str:
    """The settings in a few characters that may stand in the name of a folder."""
    parts = [
        public_name(value) if name == "student" else f"{OPTIONS.get(name, name)}={value}"[:CUT]
        for name, value in settings.items()
    ]
    return "".join(c if c.isalnum() or c in "-=.," else "-" for c in " ".join(parts)).strip("-.")

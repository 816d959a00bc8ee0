"""What a dump is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softcache.cache.encodings import MAX_TEMPERATURE
from softcache.errors import SettingsError
from softcache.teachers.matrix import is_matrix
from softcache.teachers.options import OUTPUTS
from softcache.teachers.teacher import PRECISIONS

AUTO = 0  # as a batch size
DEFAULT_MAX_KL = 1e-3  # nats, of --encoding auto


@dataclass(frozen=True)
class DumpConfig:
    """Everything that decides what `dump` does."""

    teacher: str | Sequence[str]
    data: str
    temperature: float
    out: Path
    weights: Path | Sequence[Path] | None = None
    teacher_weight: Sequence[float] = ()
    teacher_output: str = "logits"  # what the teachers give, of OUTPUTS
    teacher_temperature: float = 1.0  # at which that was softened
    eval_data: str | None = None
    views: int = 1
    first_view: int = 0
    shard: tuple[int, int] = (0, 1)  # which part of the samples, of how many
    augment: str | None = None
    seed: int = 0
    encoding: str = "dense"
    like: Path | None = None  # a cache whose encoding, and what it was fitted to, is taken
    max_kl: float = DEFAULT_MAX_KL
    classes: int | None = None
    batch_size: int = 256  # AUTO: the fastest that fits
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    workers: int = 0
    embed_inputs: bool = False  # the samples themselves go into the cache
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise SettingsError(
                f"temperature is {self.temperature}; expected a number above 0, up to 1e6"
            )
        if self.classes is not None and self.classes < 2:
            raise SettingsError(f"classes is {self.classes}; expected 2 or more")
        if self.seed >= 1 << 63:
            raise SettingsError(f"seed is {self.seed}; expected less than 2^63")
        if not 0 < self.max_kl < math.inf:
            raise SettingsError(f"max-kl is {self.max_kl}; expected a number above 0")
        for name, low in (
            ("views", 1),
            ("first_view", 0),
            ("seed", 0),
            ("batch_size", AUTO),
            ("workers", 0),
        ):
            if getattr(self, name) < low:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected {low} or more")
        if self.teacher_output not in OUTPUTS:
            raise SettingsError(
                f"teacher output {self.teacher_output!r} is unknown; expected {', '.join(OUTPUTS)}"
            )
        if not 0 < self.teacher_temperature <= MAX_TEMPERATURE:
            raise SettingsError(
                f"teacher temperature is {self.teacher_temperature}; expected a number above 0, up to 1e6"
            )
        matrices = [spec for spec in self.teachers_and_weights[0] if is_matrix(spec)]
        if matrices and (self.augment or self.eval_data):
            raise SettingsError(
                f"teacher {matrices[0]} is a matrix, which knows its samples as they are and no others; "
                "leave --augment, --views and --eval-data out"
            )
        if self.precision not in PRECISIONS:
            raise SettingsError(
                f"precision {self.precision!r} is unknown; expected {', '.join(PRECISIONS)}"
            )
        if not 0 <= self.shard[0] < self.shard[1]:
            raise SettingsError(
                f"shard is {self.shard[0]}/{self.shard[1]}; expected i/n with i from 0 to n - 1"
            )
        if self.views + self.first_view > 1 and not self.augment:
            raise SettingsError(
                f"{self.views} views without --augment would all be the same; add it, or ask for one"
            )
        teachers, weights = self.teachers_and_weights
        if weights and len(weights) != len(teachers):
            raise SettingsError(
                f"{len(weights)} --weights for {len(teachers)} --teacher; expected one for each, in "
                "the same order, or none"
            )

    @property
    def teachers_and_weights(self) -> tuple[list[str], list[Path]]:
        teachers = [self.teacher] if isinstance(self.teacher, str) else list(self.teacher)
        weights = [self.weights] if isinstance(self.weights, Path) else list(self.weights or ())
        return teachers, weights

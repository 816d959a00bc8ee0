"""The settings of a dump."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softcache.cache import Packed, Sampled
from softcache.cache.encodings import MAX_TEMPERATURE
from softcache.errors import SettingsError
from softcache.teachers.options import OUTPUTS, PRECISIONS
from softcache.teachers.server_options import SERVER
from softcache.teachers.spec import MATRIX_KINDS, parse_teacher
from softcache.util.settings import check_range, setting

BATCH_SIZE = 256  # the default
DRAWS = tuple(f"{kind.name}:" for kind in (Sampled, Packed))  # encodings that draw at random
AUTO = 0  # the batch size that stands for `auto`
DEFAULT_MAX_KL = 1e-3  # nats; the limit of --encoding auto
MAX_VIEWS = 1 << 20
MAX_SEED = (1 << 63) - 1

TEACHER, DATA, ENCODING = "Teacher", "Data and views", "Encoding"
RESOURCES, OUTPUT = "Resources", "Output"


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """All settings of `dump`; each becomes a command-line option, except `first_view`."""

    teacher: str | Sequence[str] = setting(
        help="The teacher. Repeat it to average the softened probabilities of several.",
        group=TEACHER,
        metavar="SPEC",
    )
    weights: Path | str | Sequence[Path | str] | None = setting(
        None,
        help="Teacher weights: safetensors, or a checkpoint of tensors. One file per teacher.",
        group=TEACHER,
        metavar="FILE",
    )
    teacher_weight: Sequence[float] = setting(
        (), help="Weight of each teacher in the average.", group=TEACHER, metavar="NUMBER"
    )
    teacher_output: str = setting(
        "logits", help="What the teacher returns.", group=TEACHER, choices=OUTPUTS
    )
    teacher_temperature: float = setting(
        1.0,
        help="Temperature at which the teacher's output is already softened.",
        group=TEACHER,
        above=0,
        at_most=MAX_TEMPERATURE,
    )
    classes: int | None = setting(
        None,
        help="Expected number of classes.",
        group=TEACHER,
        default_text="the teacher's",
        at_least=2,
    )
    trust_code: bool = setting(
        False,
        help="Load a .pt2 teacher even if the file may run code.",
        group=TEACHER,
        affects_result=False,
    )
    teacher_classes: str | None = setting(
        None,
        help="Classes of a wider teacher to keep, in this order: numbers, ranges or names, separated by "
        "commas, or a file with one per line.",
        group=TEACHER,
        metavar="FILE|LIST",
    )
    data: str = setting(help="Training samples.", group=DATA, metavar="SPEC")
    eval_data: str | None = setting(
        None,
        help="Labelled data to evaluate the teacher on.",
        group=DATA,
        metavar="SPEC",
    )
    same_classes: bool = setting(
        False,
        help="Data and teacher have the same classes in the same order, under other names.",
        group=DATA,
        affects_result=False,
    )
    loss_on: str | None = setting(
        None,
        help="Tokens of chats to dump: all, those of the assistant, or the completion, its last turn.",
        group=DATA,
        choices=("all", "assistant", "completion"),
        default_text="assistant",
    )
    skip_unreadable: bool = setting(
        False, help="Leave out image files that cannot be read.", group=DATA, affects_result=False
    )
    views: int = setting(
        1,
        help="Augmented views of each sample: N of them, or views A to B - 1.",
        group=DATA,
        metavar="N|A:B",
        at_least=1,
        at_most=MAX_VIEWS,
    )
    first_view: int = 0  # the A of --views A:B
    shard: tuple[int, int] = setting(
        (0, 1), help="Dump only part I of N of the samples.", group=DATA, metavar="I/N"
    )
    augment: str | None = setting(
        None, help="Augmentation that makes the views differ.", group=DATA, metavar="SPEC"
    )
    seed: int = setting(
        0, help="Seed of the augmentation.", group=DATA, at_least=0, at_most=MAX_SEED
    )
    temperature: float = setting(
        4.0,
        help="Temperature T of the stored softmax(logits / T).",
        group=ENCODING,
        above=0,
        at_most=MAX_TEMPERATURE,
    )
    encoding: str = setting("dense", help="How each row is stored.", group=ENCODING, metavar="SPEC")
    targets: str = setting(
        "softmax",
        help="Whether each sample has one class (softmax), or any number of them (sigmoid).",
        group=ENCODING,
        choices=("softmax", "sigmoid"),
    )
    max_kl: float = setting(
        DEFAULT_MAX_KL,
        help="Largest KL in nats that --encoding auto accepts, at T, 1, 2, 4 and 8.",
        group=ENCODING,
        above=0,
    )
    like: Path | None = setting(
        None,
        help="Use the encoding of this cache, so that the two can be merged.",
        group=ENCODING,
        metavar="CACHE",
    )
    batch_size: int = setting(
        BATCH_SIZE,
        help="Samples per forward pass; auto takes the fastest size that fits in memory.",
        group=RESOURCES,
        metavar="N|auto",
        at_least=AUTO,
    )
    batch_tokens: int = setting(
        16384,
        help="Tokens per forward pass, with padding, where samples are texts as tokens.",
        group=RESOURCES,
        at_least=1,
    )
    device: str = setting(
        "auto", help="Device: auto, cpu, cuda, cuda:1, mps.", group=RESOURCES, affects_result=False
    )
    precision: str = setting(
        "fp32", help="Numerical precision of the teacher.", group=RESOURCES, choices=PRECISIONS
    )
    compile: bool = setting(False, help="Compile the teacher with torch.compile.", group=RESOURCES)
    workers: int = setting(
        0,
        help="Worker processes that load data.",
        group=RESOURCES,
        at_least=0,
        affects_result=False,
    )
    out: Path = setting(
        help="Cache file to write.", group=OUTPUT, metavar="FILE", affects_result=False
    )
    strict: bool = setting(
        False,
        help="Exit with an error if a result cannot be right; the rows are kept.",
        group=OUTPUT,
        affects_result=False,
    )
    embed_inputs: bool = setting(
        False, help="Store the samples too, so that training needs no --data.", group=OUTPUT
    )
    overwrite: bool = setting(
        False,
        help="Replace an existing cache, or a dump that was started with other settings.",
        group=OUTPUT,
        affects_result=False,
    )

    def __post_init__(self) -> None:
        check_range(self)
        if self.first_view < 0:
            raise SettingsError(f"--views starts at {self.first_view}; expected 0 or more")
        if not 0 <= self.shard[0] < self.shard[1]:
            raise SettingsError(
                f"--shard is {self.shard[0]}/{self.shard[1]}; expected I/N with I from 0 to N - 1"
            )
        draws = self.encoding.startswith(DRAWS)  # of which each view has its own
        if self.views + self.first_view > 1 and not self.augment and not draws:
            raise SettingsError(
                f"{self.views} views without --augment would all be the same; add it, or ask for one view "
                "(sampled:N and packed:BYTES draw anew in each view)"
            )
        if self.weight_files and len(self.weight_files) != len(self.teachers):
            raise SettingsError(
                f"{len(self.weight_files)} --weights for {len(self.teachers)} --teacher; expected one for "
                "each teacher, in the same order, or none"
            )
        if (self.encoding == "bernoulli" and not self.multi_label) or (
            self.multi_label and self.encoding not in ("dense", "bernoulli")
        ):
            raise SettingsError(
                f"--targets {self.targets} with --encoding {self.encoding}: log-odds of several labels are "
                "stored as float16 and in no other way; leave --encoding out"
            )
        matrices = [text for text in self.teachers if parse_teacher(text).kind in MATRIX_KINDS]
        if matrices and (self.views > 1 or self.eval_data):
            raise SettingsError(
                f"teacher {matrices[0]} is a matrix with one row of outputs for each of these samples; leave "
                "out --views and --eval-data"
            )
        if self.servers:
            self._check_server(self.servers[0])

    def _check_server(self, teacher: str) -> None:
        """Raise SettingsError for settings that a teacher behind a server cannot have."""
        for option, value in (
            ("--temperature", self.temperature),
            ("--teacher-temperature", self.teacher_temperature),
        ):
            if value != 1:
                raise SettingsError(
                    f"{option} {value:g}: teacher {teacher} returns log-probabilities at temperature 1, and "
                    f"a row of which only the largest are known cannot be softened; use {option} 1"
                )
        for option, given in (
            (f"--precision {self.precision}", self.precision != "fp32"),
            ("--compile", self.compile),
            ("--batch-size auto", self.batch_size == AUTO),
            ("--targets sigmoid", self.multi_label),
            (f"--teacher-output {self.teacher_output}", self.teacher_output != "logits"),
        ):
            if given:
                raise SettingsError(
                    f"{option}: teacher {teacher} runs on a server, which decides that itself; leave it out"
                )

    @property
    def multi_label(self) -> bool:
        """Whether each class applies or not on its own."""
        return self.targets == "sigmoid"

    @property
    def tokens_of_batch(self) -> int | None:
        """The most tokens of a batch of documents; None if --batch-size says how many documents it has."""
        return self.batch_tokens if self.batch_size == BATCH_SIZE else None

    @property
    def encoding_spec(self) -> str:
        """The specification of the encoding: log-odds have one of their own."""
        return "bernoulli" if self.multi_label else self.encoding

    @property
    def teachers(self) -> list[str]:
        """The specifications of all teachers, as a list even if there is only one."""
        return [self.teacher] if isinstance(self.teacher, str) else list(self.teacher)

    @property
    def servers(self) -> list[str]:
        """The specifications of the teachers that are behind servers."""
        return [text for text in self.teachers if parse_teacher(text).kind == SERVER]

    @property
    def weight_files(self) -> list[Path]:
        """The weight files of the teachers, in the same order; empty if none are given."""
        if isinstance(self.weights, str | Path):
            return [Path(self.weights)]
        return [Path(path) for path in self.weights or ()]

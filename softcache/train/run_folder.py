"""The folder of a training run: facts, metrics, weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
from torch import Tensor, nn

from softcache.data.rows import TOKEN, WORD
from softcache.data.table_columns import TableColumns, columns_from_json
from softcache.errors import FormatError, ModelError, SettingsError
from softcache.models.build import build
from softcache.models.language import TokenModel
from softcache.models.spec import BUILT_IN, HUB, parse_model
from softcache.models.weights import load_weights, read_weights
from softcache.train.run_facts import read_facts, read_metrics
from softcache.util.messages import one_line
from softcache.util.spec import CODE, escape

WEIGHTS = "student.safetensors"
TOKENIZER = "tokenizer"  # folder of the tokenizer of a student of tokens
UNFINISHED_METRICS = "metrics.jsonl.partial"  # metrics.jsonl, until the student is saved


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        facts: the contents of config.json.
        metrics: the lines of metrics.jsonl, one for each epoch.
        trust_code: whether a student in a .pt2 file is loaded even if the file may run code.
    """

    folder: Path
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    trust_code: bool = False

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.facts["input_shape"])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.facts["classes"])

    @property
    def multi_label(self) -> bool:
        """Whether samples have any number of labels."""
        return self.facts.get("multi_label") is True

    @property
    def unit(self) -> str | None:
        """What a row is, if samples have many: a token, word, frame or pixel."""
        unit: str | None = self.facts.get("unit")
        return unit

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes in order; empty if it does not name them all."""
        names = tuple(self.facts.get("class_names") or ())
        return names if len(names) == self.classes else ()

    @property
    def columns(self) -> TableColumns | None:
        """The input columns; None if the data was not a table."""
        columns = self.facts.get("columns") or []
        if all(isinstance(name, str) for name in columns):  # as versions before 0.2 wrote them
            words = self.facts.get("categories") or {}
            columns = [
                {"name": name} | ({"words": words[name]} if name in words else {})
                for name in columns
            ]
        return columns_from_json(columns, str(self.folder))

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """Dummy inputs (batch, *input_shape) of the dtype that the student expects.

        Floats are uniform in [0, 1]. Integers are code points of lowercase letters if the student is a
        model from a hub, which reads text, and otherwise all 1, as a token id is.
        """
        shape, generator = (batch, *self.input_shape), torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.facts.get("input_dtype", "float32"))
        if dtype.is_floating_point:
            return torch.rand(shape, generator=generator, dtype=dtype)
        if self.unit is None and parse_model(self.facts["settings"]["student"]).kind in HUB:
            return torch.randint(ord("a"), ord("z") + 1, shape, generator=generator, dtype=dtype)
        return torch.ones(shape, dtype=dtype)

    @property
    def weights(self) -> Path:
        """The file of the student's weights."""
        return self.folder / WEIGHTS

    def model(self, specs: Sequence[str] = ()) -> nn.Module:
        """The student with its weights, in eval mode.

        A run folder may come from anybody, so code that it names is not run.

        Args:
            specs: specifications of students that are code, which must be given again, with the folder that
                config.json leaves out. The one with this student's name is used.

        Raises:
            SettingsError: the student is code, and no specification has its name; or it is invalid.
            ModelError: the student cannot be built, or its weights do not fit.
        """
        name = str(self.facts["settings"]["student"])
        spec = next((spec for spec in specs if parse_model(spec).public_name == name), None)
        if spec is None and parse_model(name).kind in (CODE, "pt2"):
            raise SettingsError(
                f"{self.folder}: its student {name} is code, which is not run because a folder names it; if "
                f"you trust it, give it with --student, such as --student path/to/{name}"
            )
        self._check_size(spec or name)
        try:
            model = build(
                spec or self._with_own_tokenizer(name),
                input_shape=self.input_shape,
                classes=self.classes,
                trust_code=self.trust_code,
                unit=self.unit,
            )
        except (SettingsError, ModelError) as error:
            if spec is not None:
                raise
            raise ModelError(
                f"{self.folder}: the student {name} cannot be built here ({error}); give the path of its "
                "code with --student"
            ) from error
        load_weights(model, self.weights)
        self._try(model.eval())
        return model

    def _with_own_tokenizer(self, name: str) -> str:
        """The specification with the tokenizer that lies in the folder, whose own place was left out."""
        parsed, own = parse_model(name), self.folder / TOKENIZER
        if self.unit not in (TOKEN, WORD) or "tokenizer" not in parsed.options:
            return name
        options = {key: value for key, value in parsed.options.items() if key != "tokenizer"}
        if own.is_dir():
            options["tokenizer"] = str(own)
        return f"{parsed.kind}:{escape(parsed.place)}?{urlencode(options)}" if options else name

    def _try(self, model: nn.Module) -> None:
        """Raise ModelError unless the student returns finite logits for inputs of the run."""
        example = self.example(2)
        problem = f"{self.folder}: its student"
        for name, tensor in model.state_dict().items():
            if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"{problem} has a weight that is not finite, {name}; train it again"
                )
        try:
            with torch.inference_mode():
                logits = model(example)
        except Exception as error:  # a model can raise anything
            raise ModelError(
                f"{problem} raised {type(error).__name__} on inputs {tuple(example.shape)} of "
                f"{example.dtype}: {one_line(error)[:300]}; the folder is damaged, get it again"
            ) from error
        if self.unit is not None:
            last = -1 if isinstance(logits, Tensor) and logits.ndim == 3 else 1
            wrong = not isinstance(logits, Tensor) or logits.ndim not in (3, 4)
            wrong = wrong or logits.shape[last] != self.classes
        else:
            wrong = not isinstance(logits, Tensor) or logits.shape != (2, self.classes)
        if wrong:
            raise ModelError(
                f"{problem} does not return logits of {self.classes} classes; the folder is damaged, get it "
                "again"
            )

    def _check_size(self, spec: str) -> None:
        """Raise ModelError before a built-in model is made that is far larger than the weights are."""
        if parse_model(spec).kind not in BUILT_IN:
            return
        with torch.device("meta"):
            model = build(spec, input_shape=self.input_shape, classes=self.classes)
        needed = sum(tensor.numel() for tensor in model.parameters())
        stored = sum(tensor.numel() for tensor in read_weights(self.weights).values())
        if needed > 2 * stored + 1024:
            raise ModelError(
                f"{self.folder}: the student {spec} has {needed:,} parameters, and {self.weights.name} has "
                f"{stored:,}; the folder is damaged, get it again"
            )


def save_tokenizer(model: nn.Module, folder: Path) -> None:
    """Save the tokenizer of a student of tokens in its run folder, if it has one."""
    if isinstance(model, TokenModel) and model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder / TOKENIZER)


def expand(folders: Sequence[Path]) -> list[Path]:
    """The folders of single runs; a folder that holds several finished runs is replaced by these."""
    run_folders: list[Path] = []
    for folder in folders:
        subfolders = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS}"))
        is_run = (folder / WEIGHTS).exists()
        run_folders += subfolders if subfolders and not is_run else [folder]
    return run_folders


def open_run(folder: Path, *, trust_code: bool = False) -> Run:
    """Read the facts and the metrics of a finished run.

    Args:
        trust_code: load a student in a .pt2 file even if the file may run code.

    Raises:
        SettingsError: the folder does not hold a finished run.
    """
    if not (folder / WEIGHTS).is_file():
        unfinished = "its training has not finished: run the same command again"
        reason = unfinished if (folder / UNFINISHED_METRICS).exists() else f"it has no {WEIGHTS}"
        raise SettingsError(
            f"{folder} is not a finished run: {reason}; name a folder of softcache train"
        )
    try:
        return Run(
            folder, read_facts(folder / "config.json"), read_metrics(folder / "metrics.jsonl")
        )
    except FormatError as error:
        raise SettingsError(
            f"{folder} is not a run as softcache train writes it: {error}; get it again, or train it again"
        ) from error


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Check that a run can be written to a folder, without creating anything.

    Raises:
        SettingsError: the folder is not writable, or holds a finished run and `overwrite` is not set.
    """
    finished = folder / WEIGHTS
    if finished.exists() and not overwrite:
        raise SettingsError(
            f"{folder} holds a finished run ({finished.name}); give another --out, or --overwrite"
        )
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "is not writable" if nearest.is_dir() else "is a file"
        raise SettingsError(f"cannot write in {folder}: {nearest} {reason}; give another --out")


def make_run_folder(folder: Path, history: list[dict[str, Any]]) -> None:
    """Create the folder and its unfinished metrics; a finished run in it stays until the new one is saved.

    Args:
        history: lines of metrics of the epochs that are done.

    Raises:
        SettingsError: the folder cannot be written.
    """
    lines = "".join(json.dumps(line) + "\n" for line in history)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED_METRICS).write_text(lines)
    except OSError as error:
        raise SettingsError(
            f"cannot write in {folder} ({error.strerror}); give another --out"
        ) from error

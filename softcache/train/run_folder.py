"""What `softcache train` left in a folder: facts, metrics, weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.models.build import build
from softcache.models.spec import HUB, parse_model
from softcache.models.weights import load_weights


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    facts: dict[str, Any]  # config.json
    metrics: list[dict[str, Any]]  # a line an epoch

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.facts["input_shape"])

    @property
    def classes(self) -> int:
        return int(self.facts["classes"])

    def example(self, batch: int, seed: int = 0) -> Tensor:
        """Inputs of no meaning, (batch, *shape), of the type that the student takes.

        Floats in [0, 1]; code points of letters for a model of texts; otherwise ids of 1.
        """
        shape, draws = (batch, *self.input_shape), torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.facts.get("input_dtype", "float32"))
        if dtype.is_floating_point:
            return torch.rand(shape, generator=draws, dtype=dtype)
        if parse_model(self.facts["settings"]["student"]).kind in HUB:
            return torch.randint(ord("a"), ord("z") + 1, shape, generator=draws, dtype=dtype)
        return torch.ones(shape, dtype=dtype)

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def model(self, specs: Sequence[str] = ()) -> nn.Module:
        """The student with its weights, in eval mode.

        Args:
            specs: where code is, if it is not built-in: config.json names files without folders. The one of
                this student's name is taken.

        Raises:
            SettingsError, ModelError: it cannot be built, or its weights do not fit.
        """
        named = str(self.facts["settings"]["student"])
        spec = next((spec for spec in specs if parse_model(spec).public_name == named), None)
        try:
            model = build(spec or named, input_shape=self.input_shape, classes=self.classes)
        except (SettingsError, ModelError) as error:
            if spec is not None:
                raise
            raise ModelError(
                f"{self.folder}: the student {named} cannot be built here ({error}); say where its code "
                "is with --student"
            ) from error
        load_weights(model, self.weights)
        return model.eval()


def expand(folders: Sequence[Path]) -> list[Path]:
    """Folders that hold several finished runs stand for these."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS}"))
        found += inside if inside and not (folder / WEIGHTS).exists() else [folder]
    return found


def open_run(folder: Path) -> Run:
    """Read the facts and the metrics of a finished run.

    Raises:
        SettingsError: it is no folder of a finished run.
    """
    if not (folder / WEIGHTS).is_file():
        begun = any(folder.glob("metrics.jsonl.partial"))
        unfinished = "its training has not finished: run the same command again"
        why = unfinished if begun else f"it has no {WEIGHTS}"
        raise SettingsError(f"{folder} is no finished run: {why}; name a folder of softcache train")
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = Run(folder, facts, [json.loads(line) for line in lines])
        if not isinstance(facts["settings"]["student"], str) or not found.input_shape:
            raise KeyError("student")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{folder}: config.json or metrics.jsonl cannot be read ({type(error).__name__}: {error}); "
            "train it again"
        ) from error
    return found


UNFINISHED_METRICS = "metrics.jsonl.partial"  # until the student is there

WEIGHTS = "student.safetensors"


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Be sure, before the work, that the folder of a run can be had; nothing is made yet.

    Raises:
        SettingsError: it cannot be written, or holds a finished run and `overwrite` is not set.
    """
    finished = folder / WEIGHTS
    if finished.exists() and not overwrite:
        raise SettingsError(
            f"{folder} holds a finished run ({finished.name}); give another --out, or --overwrite"
        )
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        raise SettingsError(f"cannot write in {folder}: {there} {why}; give another --out")


def make_run_folder(folder: Path, history: list[dict[str, Any]]) -> None:
    """Make the folder; a run that was finished in it stays as it is until this one is.

    Raises:
        SettingsError: it cannot be written.
    """
    lines = "".join(json.dumps(line) + "\n" for line in history)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED_METRICS).write_text(lines)
    except OSError as error:
        raise SettingsError(
            f"cannot write in {folder} ({error.strerror}); give another --out"
        ) from error

"""Sequences of "spoken" symbols as frames, and recognisers of them that are trained with CTC."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, log_softmax

SYMBOLS, FRAMES, FEATURES, LONGEST = 6, 48, 8, 6  # class 0 is the blank

MODELS = '''
from pathlib import Path

import torch
from torch import nn

class Recogniser(nn.Module):
    """Logits (B, T / 2, 7) of frames (B, T, 8)."""
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv1d(8, width, 5, 2, 2)
        self.second = nn.Conv1d(width, width, 5, 1, 2)
        self.out = nn.Linear(width, 7)
    def forward(self, x):
        hidden = self.second(self.first(x.transpose(1, 2)).relu()).relu()
        return self.out(hidden.transpose(1, 2))

def teacher():
    model = Recogniser(48)
    weights = Path(__file__).with_name("teacher.pt")
    if weights.exists():
        model.load_state_dict(torch.load(weights))
    return model

def student():
    return Recogniser(12)

class Longer(Recogniser):
    """As many positions as frames, twice those of the teacher."""
    def forward(self, x):
        return super().forward(x).repeat_interleave(2, 1)

class Shorter(Recogniser):
    def forward(self, x):
        return super().forward(x)[:, :-1]

def longer():
    return Longer(12)

def shorter():
    return Shorter(12)
'''


def spoken(count: int, seed: int = 0) -> tuple[Tensor, list[list[int]]]:
    """Frames (N, FRAMES, FEATURES) of sequences of symbols, each of 2 to 6 frames, and the sequences."""
    random = np.random.default_rng(seed)
    voice = np.random.default_rng(1).normal(size=(SYMBOLS + 1, FEATURES)).astype(np.float32)
    frames = np.zeros((count, FRAMES, FEATURES), np.float32)
    sequences = []
    for sample in frames:
        symbols: list[int] = []
        start = int(random.integers(0, 4))
        for _ in range(int(random.integers(3, LONGEST + 1))):
            symbol, length = int(random.integers(1, SYMBOLS + 1)), int(random.integers(2, 7))
            if start + length > FRAMES:
                break
            sample[start : start + length] = voice[symbol]
            symbols.append(symbol)
            start += length + 2
        sequences.append(symbols)
    noise = random.normal(scale=0.8, size=frames.shape).astype(np.float32)
    return torch.from_numpy(frames + noise), sequences


def train_recogniser(
    model: nn.Module, frames: Tensor, sequences: list[list[int]], epochs: int, seed: int = 0
) -> None:
    """Train with CTC on whole sequences: Graves et al., "Connectionist temporal classification" (2006)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(frames), generator=generator).split(32):  # type: ignore[no-untyped-call]
            logits = model(frames[rows])
            wanted = [sequences[row] for row in rows]
            loss = ctc_loss(
                log_softmax(logits, -1).transpose(0, 1),
                torch.tensor([symbol for sequence in wanted for symbol in sequence]),
                torch.full((len(rows),), logits.shape[1]),
                torch.tensor([len(sequence) for sequence in wanted]),
                zero_infinity=True,
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def decoded(logits: Tensor) -> list[list[int]]:
    """The most likely symbols of logits (B, T', C), without repetitions and blanks."""
    return [
        [symbol for symbol in torch.unique_consecutive(row).tolist() if symbol]
        for row in logits.argmax(-1)
    ]


def symbol_errors(model: nn.Module, frames: Tensor, sequences: list[list[int]]) -> float:
    """Insertions, deletions and substitutions, as a share of the symbols."""
    with torch.inference_mode():
        found = decoded(model.eval()(frames))
    edits = sum(distance(a, b) for a, b in zip(found, sequences, strict=True))
    return edits / sum(map(len, sequences))


def distance(a: list[int], b: list[int]) -> int:
    """The Levenshtein distance of two sequences."""
    row = list(range(len(b) + 1))
    for number, symbol in enumerate(a, 1):
        row_before, row = row, [number]
        for place, other in enumerate(b, 1):
            cheapest = min(row_before[place], row[-1]) + 1
            row.append(min(cheapest, row_before[place - 1] + (symbol != other)))
    return row[-1]


def write_models(folder: Path) -> Path:
    """The file of the recognisers."""
    path = folder / "models.py"
    path.write_text(MODELS)
    return path


def load_models(path: Path) -> Any:  # noqa: ANN401  # a module
    """The module of the recognisers."""
    spec = importlib.util.spec_from_file_location("recognisers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_task(folder: Path, sequences: int, training: int, epochs: int) -> str:
    """A trained teacher in models.py, and the frames of some sequences without their transcripts.

    Args:
        sequences: that a student gets.
        training: sequences with transcripts that the teacher is trained on.
        epochs: of this training.
    """
    models = load_models(write_models(folder))
    torch.manual_seed(0)
    teacher = models.teacher()
    frames, symbols = spoken(training)
    train_recogniser(teacher, frames, symbols, epochs)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    np.savez(folder / "frames.npz", x_train=frames[:sequences].numpy())
    return f"npz:{folder / 'frames.npz'}"


def student_of(run: Path, models: Path) -> nn.Module:
    """The student of a run."""
    student: nn.Module = load_models(models).student()
    student.load_state_dict(load_file(run / "student.safetensors"))
    return student

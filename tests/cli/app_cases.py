"""Models, files and command lines that the tests of the command line share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from click.testing import CliRunner, Result

from softcache.cache import Cache
from softcache.cli.app import main
from tests.conftest import make_arrays

Arguments = Sequence[str | Path]


MODELS = '''
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.linear = change, nn.Linear(64, 5)
        with torch.no_grad():  # each class has a bright line
            self.linear.weight.view(-1, 8, 8)[range(5), range(5)] += 1

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)))

def teacher():
    return Model(lambda z: z)

def nan():
    return Model(lambda z: z * torch.nan)

def pair():
    return Model(lambda z: (z, z))

def narrow():
    return Model(lambda z: z[:, :3])

def raises():
    """In the middle of the dump: not on the single sample of the trial."""
    def change(z):
        if len(z) > 1:
            raise ValueError("no\\nmore")
        return z
    return Model(change)
'''


def without_verdicts(stderr: str) -> str:
    """Standard error without the warnings that the teacher of the shared cache is untrained."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if "the teacher agrees with" not in line)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Files for a command line; everything but the data and the finished cache is in `folder`."""

    folder: Path
    data: str
    cache: Cache

    def dump(self, teacher: str = "teacher", *more: str | Path) -> Arguments:
        """A dump of the tiny data; options in `more` override the usual ones."""
        spec = teacher if ":" in teacher else f"{self.folder}/models.py:{teacher}"
        options = ["--teacher", spec, "--data", self.data, "--out", str(self.folder / "new.h5")]
        return ["dump", *options, *more]

    def train(self, *more: str | Path, cache: str | Path = "") -> Arguments:
        """A run from the finished cache; options in `more` override the usual ones."""
        options = ["--out", str(self.folder / "run"), "--epochs", "1"]
        options += [] if "--student" in more else ["--student", "mlp:4"]
        data = [] if "--data" in more else ["--data", self.data]
        return ["train", cache or self.cache.path, *options, *data, *more]

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def arrays(self, change: str) -> str:
        """The tiny data with a change, but with the same file name."""
        images, labels = make_arrays()
        if change == "cut":
            images, labels = images[:-1], labels[:-1]
        elif change == "other":
            images, labels = make_arrays(seed=5)
        elif change == "label":
            labels[200] = 9
        np.savez(self.folder / "tiny.npz", x_train=images, y_train=labels)
        return f"npz:{self.folder / 'tiny.npz'}"

    def hdf5(self) -> Path:
        path = self.folder / "foreign.h5"
        with h5py.File(path, "w") as file:
            file["log_probs"] = np.zeros((3, 5), np.float16)
        return path

    def weights(self) -> Path:
        path = self.folder / "weights.pt"
        torch.save({"linear.weight": torch.zeros(5, 63), "bias": torch.zeros(5)}, path)
        return path


def softcache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))

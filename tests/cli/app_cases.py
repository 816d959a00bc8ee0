"""What the tests of app share."""

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
    def __init__(self, answer):
        super().__init__()
        self.answer, self.linear = answer, nn.Linear(64, 5)

    def forward(self, x):
        return self.answer(self.linear(x.flatten(1)))

def teacher():
    return Model(lambda z: z)

def nan():
    return Model(lambda z: z * torch.nan)

def pair():
    return Model(lambda z: (z, z))

def narrow():
    return Model(lambda z: z[:, :3])

def raises():
    """In mid-dump: not on the single sample of the trial."""
    def answer(z):
        if len(z) > 1:
            raise ValueError("no\\nmore")
        return z
    return Model(answer)
'''


@dataclasses.dataclass(frozen=True)
class Place:
    """Files for a command line; `folder` holds all but the data and the finished cache."""

    folder: Path
    data: str
    cache: Cache

    def dump(self, teacher: str = "teacher", *more: str | Path) -> Arguments:
        """A dump of the tiny data; options in `more` override those before."""
        spec = teacher if ":" in teacher else f"{self.folder}/models.py:{teacher}"
        options = ["--teacher", spec, "--data", self.data, "--out", str(self.folder / "new.h5")]
        return ["dump", *options, *more]

    def train(self, *more: str | Path, cache: str | Path = "") -> Arguments:
        """A run from the finished cache; options in `more` override those before."""
        options = ["--out", str(self.folder / "run"), "--epochs", "1"]
        options += [] if "--student" in more else ["--student", "mlp:4"]
        data = [] if "--data" in more else ["--data", self.data]
        return ["train", cache or self.cache.path, *options, *data, *more]

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def arrays(self, change: str) -> str:
        """The tiny data with a change, under their own name."""
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

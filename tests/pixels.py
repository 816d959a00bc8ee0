"""Images with a class for each pixel, and models of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, interpolate

from softcache.data.open import open_source

MNIST = Path(__file__).parents[1] / "data" / "mnist"

Array = npt.NDArray[np.uint8]

MODELS = '''
import torch
from torch import nn

class OfPixels(nn.Module):
    """Class 1 where the pixel is bright, else class 0: of the pixel alone. Class 2 is never right."""
    def __init__(self, stride=1):
        super().__init__()
        self.stride, self.bias = stride, nn.Parameter(torch.zeros(1))
    def forward(self, x):
        bright = 8 * x[:, :1, :: self.stride, :: self.stride] - 4 + self.bias
        return torch.cat([-bright, bright, torch.full_like(bright, -8)], 1)

def teacher():
    return OfPixels()

def smaller():  # an output of half the size, which is resized
    return OfPixels(2)

def one_row():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 3))

def student():
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))

def same(x):
    return x

class Segmenter(nn.Module):
    """Logits (B, 11, H / 2, W / 2), from features of several scales."""
    def __init__(self, width):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU(),
        )
        self.digit = nn.Sequential(nn.Flatten(1), nn.Linear(2 * width * 16, 32), nn.ReLU(), nn.Linear(32, 10))
        self.ink = nn.Conv2d(1, 2, 3, 2, 1)
    def forward(self, x):
        digits = self.digit(self.down(x))  # which digit it is, for all pixels
        ink = self.ink(x)
        return torch.cat([ink[:, :1], ink[:, 1:] + digits[:, :, None, None]], 1)

def digits_teacher():
    from pathlib import Path
    model = Segmenter(16)
    model.load_state_dict(torch.load(Path(__file__).with_name("teacher.pt")))
    return model

def digits_student():
    return Segmenter(4)
'''


def make_arrays(count: int = 24, seed: int = 0, size: int = 12) -> tuple[Array, Array]:
    """Grey images (N, size, size) of bright and dark blocks, and their masks: class 1 where it is bright.

    The first pixel of each mask is to be ignored.
    """
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 2, (count, size // 3, size // 3), dtype=np.uint8)
    masks = blocks.repeat(3, 1).repeat(3, 2)
    images = masks * np.uint8(255)
    masks[:, 0, 0] = 255
    return images, masks


def write_npz(folder: Path, name: str = "pixels.npz") -> str:
    """An npz file with the splits train and test."""
    x, y = make_arrays()
    x_test, y_test = make_arrays(8, seed=1)
    np.savez(folder / name, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return f"npz:{folder / name}"


def write_folders(folder: Path, images: Array, masks: Array) -> str:
    """A folder of images and one of masks, paletted and grey in turn."""
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        picture = Image.fromarray(mask)
        if number % 2:
            picture.putpalette([value for grey in range(256) for value in (grey, 0, 0)])
        for what, one in (("images", Image.fromarray(image)), ("masks", picture)):
            (folder / what).mkdir(exist_ok=True)
            one.save(folder / what / f"{number:02}.png")
    return f"folder:{folder / 'images'}?masks={folder / 'masks'}"


def digits(count: int, first: int = 0, split: str = "train") -> tuple[Array, Array]:
    """MNIST's images (N, 28, 28) and their masks: 0 for paper, 1 to 10 for the ink of each digit."""
    source = open_source(f"idx:{MNIST}@{split}")
    inputs, labels = source.fetch(range(first, first + count))
    images = inputs[:, 0].numpy()
    masks = np.where(images > 127, labels[:, None, None] + 1, 0).astype(np.uint8)
    return images, masks


def write_task(folder: Path, count: int, training: int, epochs: int, test: int = 300) -> str:
    """A trained teacher in models.py, and images with masks for a student.

    Args:
        count: images of the student.
        training: other images that the teacher is trained on.
        epochs: of this training.
        test: images of the split `test`.
    """
    (folder / "models.py").write_text(MODELS)
    names: dict[str, Any] = {}
    exec(MODELS, names)  # the text above
    torch.manual_seed(0)
    teacher = names["Segmenter"](16)
    images, masks = digits(training, first=count)
    inputs, labels = torch.from_numpy(images)[:, None] / 255, torch.from_numpy(masks).long()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(training).split(16):  # type: ignore[no-untyped-call]
            logits = interpolate(teacher(inputs[rows]), size=(28, 28), mode="bilinear")
            optimizer.zero_grad()
            cross_entropy(logits, labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    x, y = digits(count)
    x_test, y_test = digits(test, split="test")
    np.savez(folder / "digits.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return f"npz:{folder / 'digits.npz'}"

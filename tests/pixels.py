"""Images with a class for each pixel, and models of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

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

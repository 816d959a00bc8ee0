"""Callables and helpers shared by the tests of fingerprints and replay."""

from __future__ import annotations

from typing import Any

from softcache.cache import Header
from tests.configs import replace

AUGMENTATIONS = """
import random

import numpy as np
import torch

CALLS = 0
SEEDED, UNSEEDED = np.random.default_rng(0), np.random.default_rng()


def noise(image):
    # draws from all three generators that people use
    noisy = image.float() / 255 + 0.1 * torch.rand(image.shape)
    return noisy * random.random() + float(np.random.rand())

def noise_times(image):
    return noise(image) * 1.5

def mirror(image):
    return image.flip(-1) if random.random() < 0.5 else image

def counts(image):
    # a state of its own, which no seed resets
    global CALLS
    CALLS += 1
    return torch.roll(image, CALLS, -1)

def seeded(image):
    return torch.roll(image, int(SEEDED.integers(8)), -1)

def unseeded(image):
    return torch.roll(image, int(UNSEEDED.integers(8)), -1)

def as_array(image):
    return image.numpy() // 2

def larger(image):
    left = random.randrange(5)
    return torch.nn.functional.pad(image, [left, 4 - left, 2, 2])

def raises(image):
    raise OSError("the backgrounds are gone")

def ragged(image):
    return image[:, : 1 + int(8 * random.random())]

def draws_and_raises(image):
    random.random(), np.random.rand(), torch.rand(1)
    raise ValueError("no such image")
"""

COUNT = 60


def changed(header: Header, **fields: Any) -> Header:
    return replace(header, **fields)

"""Small caches of samples with many rows, from teachers with exact arithmetic.

A row is then the same to the bit in any batch, so that parts of a dump can be compared with the whole.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from softcache.cache import Cache, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.cache.header import PREAMBLE, parse_preamble, preamble
from softcache.cache.reader import shared_digest
from softcache.cache.writer import digest_offset
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump

DOCUMENTS, LONGEST, VOCABULARY = 40, 30, 24
BLOCK_ROWS = 8  # so that a document spans several blocks

MODELS = f"""
import os, time
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(7)
        shape = ({VOCABULARY}, {VOCABULARY})
        self.own = nn.Parameter(torch.randint(-256, 257, shape, generator=random) / 64)
        self.before = nn.Parameter(torch.randint(-64, 65, shape, generator=random) / 64)

    def forward(self, ids):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        ids = ids.clamp(min=0)  # padding
        logits = self.own[ids]
        logits[:, 1:] += self.before[ids[:, :-1]]
        return logits

class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(8)
        self.weight = nn.Parameter(torch.randint(-64, 65, (6, 5), generator=random) / 4096)

    def forward(self, images):  # a frame is a line of six pixels
        return (images * 255).round()[:, 0] @ self.weight

def teacher():
    return Language()

def frames():
    return Frames()
"""


def write_inputs(folder: Path) -> None:
    """Write documents of 1 to LONGEST tokens, of which half have a mask, images, and the teachers."""
    (folder / "models.py").write_text(MODELS)
    draw, lines = random.Random(0), []
    for number in range(DOCUMENTS):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, LONGEST))]
        if number == 3:
            ids = [draw.randrange(VOCABULARY) for _ in range(LONGEST)]  # rows of several blocks
        mask = [draw.random() < 0.6 for _ in ids]
        lines.append({"input_ids": ids} | ({"loss_mask": mask} if number % 2 else {}))
    (folder / "ids.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 6, 6), dtype=np.uint8)
    np.savez(folder / "images.npz", x=pixels)


def token_config(folder: Path, **changes: Any) -> DumpConfig:  # any field of it
    """A dump of the documents in a folder; write_inputs() is called if they are not there."""
    if not (folder / "ids.jsonl").exists():
        write_inputs(folder)
    config = DumpConfig(
        teacher=f"{folder / 'models.py'}:teacher",
        data=f"ids:{folder / 'ids.jsonl'}",
        temperature=1.0,
        embed_inputs=True,
        out=folder / "whole.h5",
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def frame_config(folder: Path, **changes: Any) -> DumpConfig:  # any field of it
    """A dump of two views of images with a row for each of their lines."""
    frames = {
        "teacher": f"{folder / 'models.py'}:frames",
        "data": f"npz:{folder / 'images.npz'}",
        "embed_inputs": False,
        "views": 2,
        "augment": "shift:1",
        "seed": 3,
    }
    return token_config(folder, **(frames | changes))


def small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Make blocks of BLOCK_ROWS rows of tokens."""
    patch.setattr(cache_allocate, "BLOCK_BYTES", BLOCK_ROWS * 2 * VOCABULARY)


@cache
def token_cache() -> bytes:
    """The bytes of a finished cache of documents, embedded, in small blocks."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        return dump(token_config(Path(folder))).path.read_bytes()


Change = Callable[[npt.NDArray[Any]], None]


def forged(path: Path, changes: dict[str, Change]) -> Cache:
    """Change arrays of a cache in place and mend every digest, so that only their values give it away."""
    cache = open_cache(path)
    header, raw = cache.header, bytearray(path.read_bytes())
    for name, change in changes.items():
        array, values = header.array(name), np.array(cache.arrays[name])
        change(values)
        raw[array.offset : array.offset + array.nbytes] = values.tobytes()
    path.unlink()  # the file is still mapped
    path.write_bytes(raw)
    changed = open_cache(path)
    for view in (None, *range(header.views)):
        for block in range(header.blocks):
            digest = (
                changed.sample_digest(block) if view is None else changed.block_digest(view, block)
            )
            at = digest_offset(header, view, block)
            raw[at : at + 8] = digest.to_bytes(8, "little")
    new = dataclasses.replace(header, shared_digest=shared_digest(changed.arrays, header))
    offset, length, _ = parse_preamble(bytes(raw[: PREAMBLE.size]), len(raw))
    text = new.to_bytes()
    assert len(text) == length
    raw[offset : offset + length] = text
    raw[: PREAMBLE.size] = preamble(offset, text)
    path.unlink()
    path.write_bytes(raw)
    return open_cache(path)

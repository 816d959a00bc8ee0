"""Bytes a token of every encoding for vocabularies of several sizes, from files on disk.

A random teacher is dumped for each; what is printed is the size of the file without the part that does not
grow with the number of tokens, divided by the number of tokens, and the bytes of the soft targets alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump

VOCABULARIES = (4096, 32_000, 152_064, 262_144)
ENCODINGS = (
    "dense",
    "quantized",
    "topk:12",
    "topk:64",
    "sampled:50",
    "packed:26",
    "packed:36",
    "basis:64,8",
)
TOKENS = 300


class Random(nn.Module):
    """Logits of a random head on random states."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.states = nn.Embedding(997, 8)
        self.states.weight.data = torch.randn(997, 8, generator=generator)
        self.head = nn.Linear(8, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, L) to logits (B, L, C)."""
        logits: Tensor = self.head(self.states(ids % 997))
        return logits


def teacher() -> nn.Module:
    """The teacher of the present size."""
    return Random(int(Path(tempfile.gettempdir(), "token_sizes").read_text()))


def main() -> None:
    """Dump and print."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for encoding in ENCODINGS:
            cells = [encoding]
            for classes in VOCABULARIES:
                Path(tempfile.gettempdir(), "token_sizes").write_text(str(classes))
                ids = np.random.default_rng(0).integers(0, classes, TOKENS)
                (folder / "ids.jsonl").write_text(json.dumps({"input_ids": ids.tolist()}))
                config = DumpConfig(
                    teacher=f"{Path(__file__)}:teacher",
                    data=f"ids:{folder / 'ids.jsonl'}",
                    temperature=1.0,
                    encoding=encoding,
                    batch_tokens=100,
                    overwrite=True,
                    out=folder / "cache.h5",
                )
                header = dump(config).header
                fixed = sum(a.nbytes for a in header.arrays if a.axis in ("shared", "commits"))
                grows = sum(a.nbytes for a in header.arrays) - fixed
                cells.append(f"{header.bytes_per_row:,} ({grows / header.row_count:,.0f})")
            rows.append(cells)
            print(*cells, file=sys.stderr)
    headers = ("encoding", *(f"V = {classes:,}" for classes in VOCABULARIES))
    print("bytes of the soft targets of a token (with its label)")
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()

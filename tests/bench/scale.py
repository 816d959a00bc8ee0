"""The cost of two very large dumps, by `dump --dry-run` on stand-ins for their data and teachers.

ImageNet-1k: 1,281,167 images of 1000 classes in 16 views. A language model: 10^9 rows of a vocabulary of
128,000, sampled, in 64 shards, one for each GPU. File sizes are those of the dry run; times follow from the
rates in the options, since the speed of a stand-in says nothing about a real teacher.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from softcache.dump.config import DumpConfig
from softcache.dump.dry_run import dry_run
from tests.bench import work_folder

STAND_INS = '''
import torch
from torch import nn


class Rows:
    """Random samples that are generated on access, each from its own index."""

    def __init__(self, samples, shape):
        self.samples, self.shape = samples, shape

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=generator), -1


def images():
    return Rows(1_281_167, (3, 32, 32))


def tokens():
    return Rows(10**9, (1, 8, 8))


class Peaked(nn.Module):
    """Logits of low rank, as peaked as those of a trained classifier."""

    def __init__(self, width, classes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(width, 64, generator=generator) / width**0.5)
        self.last = nn.Parameter(torch.randn(64, classes, generator=generator))

    def forward(self, inputs):
        return 4 * torch.tanh(inputs.flatten(1) @ self.first * 4) @ self.last / 4


def image_teacher():
    return Peaked(3 * 32 * 32, 1000)


def token_teacher():
    return Peaked(64, 128_000)
'''


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--image-rate", type=float, default=2500, help="rows/s of a ViT-B on a GPU")
    parser.add_argument(
        "--token-rate", type=float, default=10_000, help="rows/s of an 8B LLM on a GPU"
    )
    parser.add_argument("--gpus", type=int, default=64)
    options = parser.parse_args()
    with work_folder(None) as folder:
        file = folder / "standins.py"
        file.write_text(STAND_INS)
        images = DumpConfig(
            teacher=f"{file}:image_teacher",
            data=f"{file}:images",
            temperature=1.0,
            views=16,
            augment="crop:0.3,flip",
            out=folder / "never.h5",
        )
        tokens = DumpConfig(
            teacher=f"{file}:token_teacher",
            data=f"{file}:tokens",
            temperature=1.0,
            encoding="sampled:50",
            shard=(0, options.gpus),
            out=folder / "never.h5",
        )
        show("ImageNet-1k, 16 views, one GPU", images, options.image_rate, 1)
        show("10^9 rows of 128,000 classes", tokens, options.token_rate, options.gpus)


def show(name: str, config: DumpConfig, rate: float, files: int) -> None:
    """Print the dry run of one shard, and the time it would take at `rate` rows/s."""
    text = dry_run(config)
    print(f"\n## {name}\n\n$ softcache dump --dry-run …\n{text}")
    rows = re.search(r"([\d,]+) samples(?: \(.*?\))? x ([\d,]+) view", text)
    if rows:
        count = int(rows[1].replace(",", "")) * int(rows[2].replace(",", ""))
        hours = count / rate / 3600
        print(
            f"at {rate:,.0f} rows/s on each of {files} GPU(s): {files} file(s), {hours:,.1f} hours"
        )
    if Path(config.out).exists():
        raise SystemExit(f"the dry run wrote {config.out}; expected no file")


if __name__ == "__main__":
    main()

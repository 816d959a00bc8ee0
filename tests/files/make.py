"""Writes the caches of this release that are checked in, and what they decode to.

`python -m tests.files.make` in the project's folder wrote 1.0/ and 1.1/ with softcache 0.1.0. Files that
are there are never written again: a release that changes the format adds a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from softcache.cache import Cache, Sampled
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump

HERE = Path(__file__).parent
SAMPLES, CLASSES, SIDE = 48, 24, 6
ENCODINGS = {
    "dense": "dense",
    "quantized": "quantized",
    "topk": "topk:4",
    "basis": "basis:6,3",
    "sampled": "sampled:16",
}
OTHER_TEMPERATURE = 3.0


def teacher(seed: int = 1) -> nn.Module:
    """Untrained, but always the same: its weights are exact in every release of torch."""
    last = nn.Linear(SIDE * SIDE, CLASSES)
    numbers = np.random.Generator(np.random.PCG64(seed)).integers(-64, 64, (CLASSES, SIDE * SIDE))
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(numbers) / 64)
        last.bias.zero_()
    return nn.Sequential(nn.Flatten(), last)


def second_teacher() -> nn.Module:
    return teacher(2)


def main() -> None:
    one, two = (f"tests.files.make:{name}" for name in ("teacher", "second_teacher"))
    plain = DumpConfig(
        teacher=one,
        data="npz:images.npz",
        temperature=2.0,
        views=2,
        augment="shift:1,flip",
        seed=5,
        out=Path(),
    )
    both = replace(plain, teacher=[one, two], teacher_weight=[1, 3], augment="shift:1,mixup")
    bare = replace(plain, data="npz:unlabelled.npz", temperature=1.0, views=1, augment=None)
    folders = {
        "1.0": {name: replace(plain, encoding=encoding) for name, encoding in ENCODINGS.items()}
        | {"two-teachers": replace(both, first_view=2, shard=(1, 2)), "unlabelled": bare},
        "1.1": {"embedded": replace(plain, embed_inputs=True)},
    }
    # in a folder of its own, so that no path of this machine can reach a header
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        random = np.random.Generator(np.random.PCG64(0))
        images = random.integers(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=np.uint8)
        labels = random.integers(0, CLASSES, SAMPLES)
        np.savez("images.npz", x=images, y=labels)
        np.savez("unlabelled.npz", x=images)
        for version, configs in folders.items():
            folder = HERE / version
            if any(folder.glob("*.h5")):
                print(f"{folder} holds files already; they are never written again")
                continue
            folder.mkdir(exist_ok=True)
            for name, config in configs.items():
                write(folder, name, config)


def write(folder: Path, name: str, config: DumpConfig) -> None:
    cache = dump(replace(config, out=Path(f"{name}.h5")))
    arrays: dict[str, Any] = expected(cache)
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    facts = {"content_id": cache.content_id(), "samples": cache.header.samples}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / f"{name}.h5").write_bytes(cache.path.read_bytes())


def expected(cache: Cache) -> dict[str, npt.NDArray[Any]]:
    """What the cache decodes to: rows (views, samples, C) float32, labels, keys."""
    header = cache.header
    every = np.arange(header.samples)
    rows = np.stack([cache.rows(view, every) for view in range(header.views)])
    found: dict[str, npt.NDArray[Any]] = {
        "rows": rows,
        "labels": np.array(cache.labels),
        "keys": np.array(cache.keys),
    }
    if header.embeds_inputs:
        found["inputs"] = np.array(cache.arrays["inputs"])
    if not isinstance(header.encoding, Sampled):
        found["other"] = np.stack(
            [cache.rows(view, every, OTHER_TEMPERATURE) for view in range(header.views)]
        )
    return found


if __name__ == "__main__":
    main()

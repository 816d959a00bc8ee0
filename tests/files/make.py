"""Write caches with this release, and the values they decode to, to be checked in.

`python -m tests.files.make`, run in the root of the project with softcache 0.1.0, wrote 1.0/ and 1.1/, and
with 0.2.0 it wrote 1.2/.
Existing files are never rewritten: a release that changes the format adds a folder of its own.
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
    """An untrained teacher whose weights are the same, to the bit, in every release of torch."""
    last = nn.Linear(SIDE * SIDE, CLASSES)
    numbers = np.random.Generator(np.random.PCG64(seed)).integers(-64, 64, (CLASSES, SIDE * SIDE))
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(numbers) / 64)
        last.bias.zero_()
    return nn.Sequential(nn.Flatten(), last)


def second_teacher() -> nn.Module:
    return teacher(2)


def main() -> None:
    teachers = [f"tests.files.make:{name}" for name in ("teacher", "second_teacher")]
    plain = DumpConfig(
        teacher=teachers[0],
        data="npz:images.npz",
        temperature=2.0,
        views=2,
        augment="shift:1,flip",
        seed=5,
        out=Path(),
    )
    ensemble = replace(plain, teacher=teachers, teacher_weight=[1, 3], augment="shift:1,mixup")
    unlabelled = replace(plain, data="npz:unlabelled.npz", temperature=1.0, views=1, augment=None)
    folders = {
        "1.0": {name: replace(plain, encoding=encoding) for name, encoding in ENCODINGS.items()}
        | {
            "two-teachers": replace(ensemble, first_view=2, shard=(1, 2)),
            "unlabelled": unlabelled,
        },
        "1.1": {"embedded": replace(plain, embed_inputs=True)},
        "1.2": {"label-sets": replace(plain, targets="sigmoid", embed_inputs=True)},
    }
    # in a temporary folder with relative paths, so that headers hold no paths of this machine
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        random = np.random.Generator(np.random.PCG64(0))
        images = random.integers(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=np.uint8)
        labels = random.integers(0, CLASSES, SAMPLES)
        np.savez("images.npz", x=images, y=labels)
        np.savez("unlabelled.npz", x=images)
        for version, configs in folders.items():
            folder = HERE / version
            if any(folder.glob("*.h5")):
                print(f"{folder} already holds files, which are never rewritten; skipped")
                continue
            folder.mkdir(exist_ok=True)
            for name, config in configs.items():
                write(folder, name, config)


def write(folder: Path, name: str, config: DumpConfig) -> None:
    """Write NAME.h5, its decoded values NAME.npz, and its content id in NAME.json."""
    cache = dump(replace(config, out=Path(f"{name}.h5")))
    arrays: dict[str, Any] = expected(cache)
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    facts = {"content_id": cache.content_id(), "samples": cache.header.samples}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / f"{name}.h5").write_bytes(cache.path.read_bytes())


def expected(cache: Cache) -> dict[str, npt.NDArray[Any]]:
    """The values that a cache decodes to.

    Returns:
        rows: (views, samples, C) float32; other: the same at OTHER_TEMPERATURE, if the encoding can be
        re-tempered; labels, keys: (samples,); inputs: (samples, *shape), if they are embedded.
    """
    header = cache.header
    cache_rows = np.arange(header.samples)
    values: dict[str, npt.NDArray[Any]] = {
        "rows": np.stack([cache.rows(view, cache_rows) for view in range(header.views)]),
        "labels": np.array(cache.labels),
        "keys": np.array(cache.keys),
    }
    if header.embeds_inputs:
        values["inputs"] = np.array(cache.arrays["inputs"])
    if not isinstance(header.encoding, Sampled):
        values["other"] = np.stack(
            [cache.rows(view, cache_rows, OTHER_TEMPERATURE) for view in range(header.views)]
        )
    return values


if __name__ == "__main__":
    main()

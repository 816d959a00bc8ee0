"""Write caches with this release, and the values they decode to, to be checked in.

`python -m tests.files.make`, run in the root of the project with softcache 0.1.0, wrote 1.0/ and 1.1/, and
with 0.2.0 it wrote 1.2/ and 1.3/.
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
from tests.tokens import make_tokenizer, write_texts

HERE = Path(__file__).parent
SAMPLES, CLASSES, SIDE, TOKENS = 48, 24, 6, 300
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


class Language(nn.Module):
    """A teacher of tokens, which looks at one and the one before it."""

    def __init__(self) -> None:
        super().__init__()
        numbers = np.random.Generator(np.random.PCG64(3)).integers(-256, 256, (2, TOKENS, TOKENS))
        self.tables = nn.Parameter(torch.from_numpy(numbers).float() / 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.clamp(min=0)
        before = torch.nn.functional.pad(ids[:, :-1], (1, 0))
        return self.tables[0][ids] + self.tables[1][before]


def language_teacher() -> nn.Module:
    return Language()


class Lines(nn.Module):
    """A teacher with a row for each line of an image."""

    def __init__(self) -> None:
        super().__init__()
        numbers = np.random.Generator(np.random.PCG64(4)).integers(-64, 64, (SIDE, CLASSES))
        self.weight = nn.Parameter(torch.from_numpy(numbers).float() / 64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0] @ self.weight


def line_teacher() -> nn.Module:
    return Lines()


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
    documents = replace(
        plain,
        teacher="tests.files.make:language_teacher",
        data="text:texts.txt?documents=lines&tokenizer=tokenizer&length=24&stride=16",
        views=1,
        augment=None,
        embed_inputs=True,
    )
    folders = {
        "1.0": {name: replace(plain, encoding=encoding) for name, encoding in ENCODINGS.items()}
        | {
            "two-teachers": replace(ensemble, first_view=2, shard=(1, 2)),
            "unlabelled": unlabelled,
        },
        "1.1": {"embedded": replace(plain, embed_inputs=True)},
        "1.2": {"label-sets": replace(plain, targets="sigmoid", embed_inputs=True)},
        "1.3": {
            "documents": replace(documents, encoding="topk:4"),
            "packed": replace(documents, encoding="packed:16", views=2, temperature=1.0),
            "frames": replace(plain, teacher="tests.files.make:line_teacher"),
        },
    }
    # in a temporary folder with relative paths, so that headers hold no paths of this machine
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        random = np.random.Generator(np.random.PCG64(0))
        images = random.integers(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=np.uint8)
        labels = random.integers(0, CLASSES, SAMPLES)
        np.savez("images.npz", x=images, y=labels)
        np.savez("unlabelled.npz", x=images)
        make_tokenizer(Path("tokenizer"))
        write_texts(Path("texts.txt"), 10)
        for version, configs in folders.items():
            folder = HERE / version
            folder.mkdir(exist_ok=True)
            for name, config in configs.items():
                if (folder / f"{name}.h5").exists():
                    print(f"{folder / name}.h5 exists, and is never rewritten; skipped")
                else:
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
        rows: (views, rows, C) float32; other: the same at OTHER_TEMPERATURE, if the encoding can be
        re-tempered; labels: (rows,); keys: (samples,); inputs: (samples, *shape), if they are embedded, or
        (tokens,); where samples have many rows, offsets (samples + 1,) and positions (rows,).
    """
    header, layout = cache.header, cache.layout
    cache_rows = np.arange(header.row_count)
    values: dict[str, npt.NDArray[Any]] = {
        "rows": np.stack([cache.rows(view, cache_rows) for view in range(header.views)]),
        "labels": np.array(cache.labels),
        "keys": np.array(cache.keys),
    }
    if header.embeds_inputs:
        values["inputs"] = np.array(cache.arrays["inputs"])
    if layout is not None:
        values |= {"offsets": layout.offsets, "positions": layout.positions_of(cache_rows)}
    if not isinstance(header.encoding, Sampled):
        values["other"] = np.stack(
            [cache.rows(view, cache_rows, OTHER_TEMPERATURE) for view in range(header.views)]
        )
    return values


if __name__ == "__main__":
    main()

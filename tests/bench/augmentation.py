"""The cost of replaying views: augmented images/s, and steps/s of `train`.

First, softcache.data.augmentations on whole batches against one image at a time, as the transform of a
Dataset works: Pillow's crop and resize, flip and colour enhancement, then a conversion to a tensor. Second,
`train` from a cache of augmented views against `train` from a cache without augmentation.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor

from softcache.data.augment import parse_augment
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.models.build import build
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.util.tensors import to_float
from tests.bench import alternate, machine, ratios, spread, synthetic_images, work_folder

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--student", default="cnn:16,32,64")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = synthetic_images(options.images, classes=10).inputs
    lines = [
        [spec, *compare(torch.from_numpy(images), spec, options.repeats)]
        for spec in ("flip", "crop:0.3", "crop:0.3,flip", "crop:0.3,flip,jitter:0.4")
    ]
    print(f"\nAugmented images (3x32x32) per second, medians; {machine()}")
    headings = ["augmentation", "batched", "one by one", "batched / one by one", "min", "max"]
    print(tabulate(lines, headers=headings, disable_numparse=True))
    with work_folder(None) as folder:
        lines = steps(folder, options.images, options.student, options.repeats)
    print(f"\nSteps/s of train, student {options.student}, batches of {BATCH}; {machine()}")
    headings = ["augmentation", "with views", "without", "with / without", "min", "max"]
    print(tabulate(lines, headers=headings, disable_numparse=True))


def compare(images: Tensor, spec: str, repeats: int) -> list[str]:
    """Cells of the first table for one augmentation."""
    rates = alternate(
        {"batched": batched(images, spec), "one by one": one_by_one(images, spec)}, repeats
    )
    medians = [f"{statistics.median(rates[name]):,.0f}" for name in ("batched", "one by one")]
    return [*medians, *spread(ratios(rates["batched"], rates["one by one"]))]


def batched(images: Tensor, spec: str) -> Callable[[], float]:
    augmentation = parse_augment(spec, seed=0, total=len(images))

    def images_per_second() -> float:
        start = time.perf_counter()
        for first in range(0, len(images), BATCH):
            batch = images[first : first + BATCH]
            augmentation(to_float(batch), None, 0, np.arange(first, first + len(batch)))
        return len(images) / (time.perf_counter() - start)

    return images_per_second


def one_by_one(images: Tensor, spec: str) -> Callable[[], float]:
    pillow_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def images_per_second() -> float:
        start = time.perf_counter()
        for first in range(0, len(pillow_images), BATCH):
            batch = pillow_images[first : first + BATCH]
            torch.stack([transformed(image, spec) for image in batch])
        return len(pillow_images) / (time.perf_counter() - start)

    return images_per_second


def transformed(image: Image.Image, spec: str) -> Tensor:
    """The same operations on one Pillow image."""
    if "crop" in spec:
        image = random_crop(image)
    if "flip" in spec and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if "jitter" in spec:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(random.uniform(0.6, 1.4))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def random_crop(image: Image.Image) -> Image.Image:
    """Crop a random part of the area and resize it to the size of the image."""
    width, height = image.size
    area, ratio = random.uniform(0.3, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
    w = min(width, round(math.sqrt(area * width * height * ratio)))
    h = min(height, round(math.sqrt(area * width * height / ratio)))
    x, y = random.randint(0, width - w), random.randint(0, height - h)
    size = (width, height)
    return image.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


def steps(folder: Path, samples: int, student: str, repeats: int) -> list[list[str]]:
    """Lines of the second table."""
    source = synthetic_images(samples, classes=10)
    data = folder / "images.npz"
    np.savez(data, x=source.inputs, y=source.labels)
    weights = folder / "teacher.safetensors"
    model = build("mlp:16", input_shape=(3, 32, 32), classes=10)
    save_file(model.state_dict(), weights)
    runs: dict[str, Callable[[], float]] = {}
    specs = [None, "crop:0.3,flip", "crop:0.3,flip,mixup"]
    for spec in specs:
        cache = dump(
            DumpConfig(
                teacher="mlp:16",
                weights=weights,
                data=f"npz:{data}",
                temperature=4.0,
                views=2 if spec else 1,
                augment=spec,
                out=folder / f"{spec}.h5",
            )
        )
        config = make_train_config(
            student=student,
            data=f"npz:{data}",
            cache=cache.path,
            out=folder / f"run-{spec}",
            epochs=2,
            batch_size=BATCH,
            overwrite=True,
            device="cpu",
        )
        runs[str(spec)] = steps_per_second(config, samples)
    rates = alternate(runs, repeats)
    return [
        [
            str(spec),
            *(f"{statistics.median(rates[str(name)]):.1f}" for name in (spec, None)),
            *spread(ratios(rates[str(spec)], rates["None"])),
        ]
        for spec in specs[1:]
    ]


def steps_per_second(config: TrainConfig, samples: int) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        train(config)
        return config.epochs * math.ceil(samples / BATCH) / (time.perf_counter() - start)

    return run


if __name__ == "__main__":
    main()

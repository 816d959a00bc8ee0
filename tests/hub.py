"""Small models, tokenizers and data sets for tests, made with Hugging Face's own libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

BREEDS = ("abyssinian", "beagle", "pug")
VIT = "hf:vit?pretrained=false&hidden_size={0}&num_hidden_layers=2&num_attention_heads=2" + (
    "&intermediate_size={0}&image_size={1}&patch_size=4"
)
GOOD, BAD = ("great", "lovely", "superb", "fine"), ("awful", "dull", "poor", "grim")
THINGS = ("film", "book", "song", "meal", "room")


def image(label: int, random: np.random.Generator) -> Any:  # noqa: ANN401  # a Pillow image
    """Stripes whose direction shows the class, in a random size and colour."""
    from PIL import Image

    height, width = random.integers(30, 50, 2)
    y, x = np.mgrid[:height, :width]
    wave = np.sin((x, y, x + y)[label] / 1.5)
    pixels = random.uniform(60, 190, 3) + 50 * wave[..., None]
    noise = random.normal(0, 15, (height, width, 3))
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def save_pets(folder: Path, train: int = 240, test: int = 60) -> Path:
    """Save images of different sizes, in the splits train and test, with save_to_disk()."""
    import datasets

    random = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(BREEDS))}
    )

    def split(samples: int) -> Any:  # noqa: ANN401  # a Dataset
        labels = random.integers(0, len(BREEDS), samples).tolist()
        images = [image(label, random) for label in labels]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    datasets.DatasetDict(train=split(train), test=split(test)).save_to_disk(str(folder))
    return folder


def save_reviews(folder: Path, train: int = 240, test: int = 60) -> Path:
    """Save short reviews, good and bad, in the splits train and test, with save_to_disk()."""
    import datasets

    random = np.random.default_rng(0)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def split(samples: int) -> Any:  # noqa: ANN401  # a Dataset
        labels = random.integers(0, 2, samples).tolist()
        texts = [
            f"The {random.choice(THINGS)} was {random.choice(GOOD if label else BAD)}"
            + " ☕" * int(random.integers(0, 3))
            for label in labels
        ]
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    datasets.DatasetDict(train=split(train), test=split(test)).save_to_disk(str(folder))
    return folder


def save_tokenizer(folder: Path, kind: str, *, padding: bool = True) -> Path:
    """Save a tokenizer: `kind` is words, or pairs for byte-pair encoding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]"]
    words = kind == "words"
    tokenizer = Tokenizer((models.WordLevel if words else models.BPE)(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer: Any = trainers.WordLevelTrainer(special_tokens=special)
    if not words:
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    texts = [f"The {thing} was {word}" for thing in THINGS for word in GOOD + BAD]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]" if padding else None,
        model_max_length=32,
    ).save_pretrained(str(folder))
    return folder


def save_vit(folder: Path, classes: int = len(BREEDS), **config: Any) -> Path:
    """Save a ViT with random weights, and its image processor; `config` overrides its settings."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    settings = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 16, "patch_size": 4, "num_labels": classes,
    }  # fmt: skip
    ViTForImageClassification(ViTConfig(**(settings | config))).save_pretrained(str(folder))
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(str(folder))
    return folder

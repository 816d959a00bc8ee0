"""A tiny tokenizer and language model, and texts for them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "a",
    "red",
    "blue",
    "mat",
    "tree",
    "and",
    "then",
    "it",
    "saw",
    "two",
    "birds",
    "fly",
    "away",
]
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Texts of up to so many words, drawn at random."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, words))) + "." for _ in range(count)]


def make_tokenizer(folder: Path, *, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens, saved in a folder."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts(200), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_language_model(
    folder: Path,
    *,
    vocabulary: int = 320,
    positions: int = 64,
    seed: int = 0,
    chat: bool = False,
    spread: float = 0.5,
) -> GPT2LMHeadModel:
    """A GPT-2 of one layer, with a padded vocabulary, in a folder with its tokenizer.

    Its weights are spread so that its predictions differ, as those of a trained one do.
    """
    make_tokenizer(folder, chat=chat)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_positions=positions,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=spread,
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return model


def write_texts(path: Path, count: int = 40, seed: int = 0) -> Path:
    """A file with a text per line."""
    path.write_text("\n".join(texts(count, seed)) + "\n")
    return path

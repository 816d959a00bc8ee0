"""Sentences of names, places and dates with a label for each word, a tokenizer and a tagger for them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from softcache.data.open import open_source

Sentence = tuple[list[str], list[str]]

TAGS = ("O", "PER", "LOC", "DATE")  # in the order of the model, which is not that of the alphabet
SYLLABLES = ("an", "be", "co", "da", "el", "fi", "go", "ha", "ir", "ju", "ka", "lo", "mi", "no")
MONTHS = ("january", "april", "june", "october")
PATTERNS = (
    "PER met PER in LOC",
    "on DATE PER left for LOC",
    "PER of LOC wrote on DATE",
    "in LOC it rained on DATE",
    "PER and PER live near LOC",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def sentences(count: int, seed: int = 0, wrong: float = 0.0) -> list[Sentence]:
    """Sentences with their tags; a word is a name or a place by what stands around it alone.

    Args:
        wrong: the share of the tags that are drawn at random, as annotators make mistakes.
    """
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for part in draw.choice(PATTERNS).split():
            word = part
            if part == "DATE":
                word = f"{draw.choice(MONTHS)} {draw.randint(1, 30)}"
            elif part.isupper():
                word = "".join(draw.choices(SYLLABLES, k=draw.randint(2, 3)))
            for one in word.split():
                words.append(one)
                tag = part if part.isupper() else "O"
                tags.append(draw.choice(TAGS) if draw.random() < wrong else tag)
        made.append((words, tags))
    return made


def write_sentences(path: Path, made: Sequence[Sentence]) -> str:
    """A file with a sentence per line, and its specification as data."""
    lines = [json.dumps({"words": words, "tags": tags}) for words, tags in made]
    path.write_text("\n".join(lines) + "\n")
    return f"jsonl:{path}?words=words&tags=tags"


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts words into syllables and letters, saved in a folder."""
    common = {word for pattern in PATTERNS for word in pattern.split() if word.islower()}
    pieces = [*sorted(common | set(MONTHS)), *SYLLABLES, *LETTERS]
    vocabulary = [*SPECIAL, *pieces, *(f"##{piece}" for piece in (*SYLLABLES, *LETTERS))]
    inner = Tokenizer(
        models.WordPiece(
            {piece: number for number, piece in enumerate(vocabulary)}, unk_token="[UNK]"
        )
    )
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_tagger(folder: Path, data: str | None = None, epochs: int = 4, seed: int = 0) -> None:
    """A small BERT that tags words, in a folder with its tokenizer; trained on `data`, if that is given."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        id2label=dict(enumerate(TAGS)),
        label2id={tag: number for number, tag in enumerate(TAGS)},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2 if data is None else 0.02,
        **SIZE,
    )
    model = BertForTokenClassification(config)
    if data is not None:
        train_tagger(model, f"{data}&tokenizer={folder}", epochs)
    model.eval().save_pretrained(folder)


def train_tagger(model: BertForTokenClassification, data: str, epochs: int) -> None:
    """Train on the labels of words."""
    source = open_source(data)
    order = [TAGS.index(name) for name in source.class_names]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(source)).split(32):  # type: ignore[no-untyped-call]
            inputs, labels = source.fetch(rows.tolist())
            layout = source.layout.take(rows.numpy())  # type: ignore[attr-defined]
            every = torch.arange(layout.rows).numpy()
            samples = torch.from_numpy(layout.samples_of(every))
            positions = torch.from_numpy(layout.positions_of(every))
            logits = model(inputs.clamp(min=0), (inputs >= 0).long()).logits[samples, positions]
            loss = cross_entropy(logits, torch.tensor(order)[torch.from_numpy(labels)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

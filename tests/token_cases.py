"""Caches of the tokens of a tiny language model, and students for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import softcache
from tests.tokens import make_language_model, write_texts

TEXTS = 40


def dump_tokens(folder: Path, encoding: str = "topk:16") -> Path:
    """A cache with its documents, next to the teacher `model` and the `corpus.txt` it was made from."""
    if not (folder / "model").exists():
        make_language_model(folder / "model")
        write_texts(folder / "corpus.txt", TEXTS)
    out = folder / f"{encoding.partition(':')[0]}.h5"
    softcache.dump(
        teacher=f"hf:{folder / 'model'}",
        data=spec_of(folder),
        out=out,
        encoding=encoding,
        temperature=1.0,
        embed_inputs=True,
    )
    return out


def spec_of(folder: Path) -> str:
    """The specification of the documents."""
    return f"text:{folder / 'corpus.txt'}?documents=lines&tokenizer={folder / 'model'}"


def gpt2(attention: str = "sdpa", seed: int = 0) -> GPT2LMHeadModel:
    """A student whose vocabulary is padded, with absolute positions."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=320, n_layer=1, n_head=2, n_embd=16, n_positions=64, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(attention: str = "sdpa", seed: int = 0) -> LlamaForCausalLM:
    """A student with rotary positions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_loss(
    cache: softcache.SoftCache, logits: Tensor, batch: dict[str, Tensor], **how: Any
) -> Tensor:
    """The loss of a batch of tokens, at the temperature of the cache."""
    rows = batch["cache_rows"]
    return softcache.distillation_loss(
        logits[..., : cache.classes],
        cache.row_targets(rows),
        batch["row_labels"],
        mask=how.pop("mask", rows >= 0),
        temperature=cache.temperature,
        **{"alpha": 0.9, **how},
    ).total

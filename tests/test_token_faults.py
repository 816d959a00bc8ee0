"""Mistakes that spoil the distillation of a language model: each is refused, warned of, or harmless."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, SettingsError
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.student import Student
from tests.configs import replace
from tests.tokens import CHAT_TEMPLATE, make_language_model, make_tokenizer, texts

STUDENT = (
    "hf:gpt2?pretrained=false&n_layer=1&n_head=2&n_embd=8&resid_pdrop=0&embd_pdrop=0&attn_pdrop=0"
)
TEACHERS = """
import torch
from transformers import GPT2LMHeadModel

class Faulty(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.model = change, GPT2LMHeadModel.from_pretrained({folder!r})
    def forward(self, input_ids, attention_mask):
        return self.change(self.model(input_ids=input_ids, attention_mask=attention_mask).logits)

def right(): return Faulty(lambda logits: logits)
def early(): return Faulty(lambda logits: logits.roll(1, 1))
def late(): return Faulty(lambda logits: logits.roll(-1, 1))
def swapped():
    order = torch.arange(320)
    order[:300] = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    return Faulty(lambda logits: logits[..., order])
def dropout(): return Faulty(lambda logits: torch.nn.functional.dropout(logits, 0.3, training=True))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows its texts, which repeat, and teachers made of it with a mistake each."""
    folder = tmp_path_factory.mktemp("faults")
    make_language_model(folder / "teacher", chat=True, spread=0.05)
    (folder / "train.txt").write_text("\n".join(texts(6, words=12) * 6))
    model = GPT2LMHeadModel.from_pretrained(folder / "teacher")
    tokenizer = make_tokenizer(folder / "teacher", chat=True)
    documents = [tokenizer(text)["input_ids"] for text in texts(6, words=12)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(240):
        ids = torch.tensor([documents[step % 6]])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "teacher")
    (folder / "faulty.py").write_text(TEACHERS.format(folder=str(folder / "teacher")))
    return folder


def config_of(folder: Path, out: Path, teacher: str = "right") -> DumpConfig:
    return DumpConfig(
        teacher=f"{folder / 'faulty.py'}:{teacher}",
        data=f"text:{folder / 'train.txt'}?documents=lines&tokenizer={folder / 'teacher'}",
        temperature=1.0,
        embed_inputs=True,
        out=out,
    )


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return dump(config_of(folder, folder / "cache.h5"))


def warnings(cache: Cache) -> list[str]:
    found: list[str] = (cache.header.summary or {}).get("warnings", [])
    return found


def test_a_right_teacher_is_not_warned_of(cache: Cache) -> None:
    summary = cache.header.summary or {}
    assert warnings(cache) == []
    assert summary["agreement"] > 0.8
    assert summary["confidence"] == pytest.approx(summary["agreement"], abs=0.15)


@pytest.mark.parametrize("teacher", ["early", "late", "swapped"])
def test_logits_of_another_position_or_vocabulary_are_warned_of(
    folder: Path, tmp_path: Path, teacher: str
) -> None:
    config = config_of(folder, tmp_path / "cache.h5", teacher)
    found = warnings(dump(config))
    assert found
    assert re.search(
        r"the teacher agrees with .* of the labels, but its mean confidence is", found[0]
    )
    with pytest.raises(DataError, match="of the labels, but its mean confidence is"):
        dump(replace(config, strict=True, out=tmp_path / "strict.h5"))


def test_dropout_that_is_left_on_is_warned_of(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "cache.h5", "dropout")
    found = [text for text in warnings(dump(config)) if "dropout" in text]
    assert len(found) == 1
    assert "gives other outputs when it runs on the same samples again" in found[0]
    with pytest.raises(DataError, match="dropout or another random layer left on"):
        dump(replace(config, strict=True, out=tmp_path / "strict.h5"))


def test_two_ids_of_a_tokenizer_that_are_swapped_are_refused(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    facts = json.loads(file.read_text())
    vocabulary = facts["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[290:292]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(facts))
    spec = f"text:{folder / 'train.txt'}?documents=lines&tokenizer={tmp_path / 'swapped'}"
    config = make_train_config(student=STUDENT, cache=cache.path, data=spec, out=tmp_path / "run")
    with pytest.raises(DataError, match="by another tokenizer"):
        train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "&length=20"}, "started with (data|length)"),
        ({"data": "&stride=9"}, "started with (data|stride)"),
    ],
)
def test_another_length_on_resume_is_refused(
    folder: Path, cache: Cache, changes: dict[str, str], message: str
) -> None:
    config = config_of(folder, cache.path)
    with pytest.raises(SettingsError, match=message):
        dump(replace(config, data=config.data + changes["data"]))


def test_another_template_on_resume_is_refused(folder: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    make_tokenizer(tmp_path / "tokenizer", chat=True)
    config = replace(
        config_of(folder, tmp_path / "cache.h5"),
        data=f"jsonl:{chats}?messages=messages&tokenizer={tmp_path / 'tokenizer'}",
    )
    dump(config)
    template = CHAT_TEMPLATE.replace("</s>", "</s> ")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    with pytest.raises(SettingsError, match=r"started with template '.*' of its tokens, now it is"):
        dump(config)


def test_a_document_of_which_nothing_counts_is_harmless(folder: Path, tmp_path: Path) -> None:
    records = [
        {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]},
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 1]},
        {"input_ids": [9]},
    ]
    file = tmp_path / "ids.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    spec = f"ids:{file}?tokenizer={folder / 'teacher'}"
    cache = dump(replace(config_of(folder, tmp_path / "cache.h5"), data=spec))
    assert cache.header.samples == 3
    assert cache.header.row_count == 3
    config = make_train_config(
        student=STUDENT, cache=cache.path, epochs=1, batch_size=1, out=tmp_path / "run"
    )
    student = train(config)[0]
    assert all(bool(t.isfinite().all()) for t in student.final_model.state_dict().values())
    assert math.isfinite(student.history[-1]["total"])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_documents_of_lengths_1_and_9_weigh_the_same_in_parts(
    folder: Path, tmp_path: Path, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 10, 3, 10, 2, 7]  # of which one token less is predicted
    records = [
        {"input_ids": torch.randint(0, 300, (n,), generator=generator).tolist()} for n in lengths
    ]
    file = tmp_path / "ids.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    spec = f"ids:{file}?tokenizer={folder / 'teacher'}"
    cache = dump(replace(config_of(folder, tmp_path / "cache.h5"), data=spec))

    def trained(parts: int) -> Student:
        config = make_train_config(
            student=STUDENT,
            cache=cache.path,
            epochs=2,
            alpha=alpha,
            batch_size=6,
            optimizer="sgd",
            micro_batches=parts,
            out=tmp_path / f"run{parts}",
        )
        return train(config)[0]

    whole, parts = trained(1), trained(3)
    assert whole.history[-1]["total"] == pytest.approx(parts.history[-1]["total"], rel=1e-5)
    for one, other in zip(
        whole.final_model.parameters(), parts.final_model.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_perplexity_is_that_of_transformers_itself(folder: Path, tmp_path: Path) -> None:
    lines = texts(5, seed=3, words=12)
    (tmp_path / "test.txt").write_text("\n".join(lines))
    test = f"text:{tmp_path / 'test.txt'}?documents=lines&tokenizer={folder / 'teacher'}"
    cache = dump(replace(config_of(folder, tmp_path / "cache.h5"), eval_data=test))
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    loss, tokens = 0.0, 0
    for line in lines:
        ids = tokenizer(line, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1, :300]  # without the padding of the vocabulary
            loss += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    evaluation = cache.header.evaluation or {}
    assert evaluation["samples"] == tokens
    assert evaluation["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    size = sum(len(line.encode()) for line in lines)
    assert evaluation["nats_per_byte"] == pytest.approx(loss / size, rel=1e-4)


def test_targets_of_other_tokens_move_the_loss(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.targets import fetch

    def soft_loss(name: str) -> float:
        config = make_train_config(
            student=STUDENT.replace("n_embd=8", "n_embd=32"),
            cache=cache.path,
            epochs=10,
            learning_rate=0.02,
            batch_tokens=64,
            out=tmp_path / name,
        )
        return float(train(config)[0].history[-1]["soft"])

    right = soft_loss("right")
    order = np.random.default_rng(0).permutation(cache.header.row_count)
    original = fetch.make_gather

    def permuted(of: Cache) -> object:
        gather = original(of)
        return lambda rows: gather(order[rows])

    monkeypatch.setattr(fetch, "make_gather", permuted)
    assert soft_loss("wrong") > 1.5 * right

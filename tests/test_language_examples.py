"""The Python code of the page on language models runs as it stands, and teaches the student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2LMHeadModel, TrainingArguments

import softcache
from tests.token_cases import batch_loss, dump_tokens, gpt2, spec_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "softcache" / "guide" / "language-models-in-python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NEEDED = {
    "plain": "torch",
    "Trainer": "transformers",
    "SFTTrainer": "trl",
    "Lightning": "lightning",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens.h5, dense.h5, corpus.txt and model."""
    folder = tmp_path_factory.mktemp("examples")
    dump_tokens(folder).rename(folder / "tokens.h5")
    dump_tokens(folder, "dense")
    return folder


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run an example of the page; returns its names."""
    names: dict[str, Any] = {
        "student": gpt2(),
        "documents": None if name == "plain" else spec_of(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder / "model"),
    }
    code = EXAMPLES[list(NEEDED).index(name)]
    exec(compile(code, f"guide, {name}", "exec"), names)
    return names


def losses_of(names: dict[str, Any]) -> list[float]:
    """The losses of the steps that an example has done."""
    if "losses" in names:
        return list(names["losses"])
    if "module" in names:
        return list(names["module"].losses)
    return [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", NEEDED)
def test_an_example_teaches_the_student(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(NEEDED[name])
    (tmp_path / "tokens.h5").symlink_to(folder / "tokens.h5")
    monkeypatch.chdir(tmp_path)
    names = run(name, folder)
    losses = losses_of(names)
    assert len(losses) >= 9
    assert losses[-1] < losses[0] - 0.1
    if name == "Trainer":
        assert names["trainer"].evaluate()["eval_loss"] < losses[0] - 0.1


def test_there_is_an_example_for_each_and_it_is_short() -> None:
    assert len(EXAMPLES) == len(NEEDED)
    assert all(len(code.splitlines()) <= 48 for code in EXAMPLES)


def test_accumulated_parts_of_a_step_are_the_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens.h5").symlink_to(folder / "tokens.h5")
    monkeypatch.chdir(tmp_path)
    names = run("Trainer", folder)

    def trained(distiller: type[Any], size: int, parts: int) -> torch.Tensor:
        arguments = TrainingArguments(
            "run", max_steps=4, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            learning_rate=0.5, optim="sgd", remove_unused_columns=False, report_to="none",
        )  # fmt: skip
        student = gpt2()
        distiller(
            student, arguments, train_dataset=names["data"], data_collator=softcache.collate_tokens
        ).train()
        return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])

    whole = trained(names["Distiller"], 8, 1)
    torch.testing.assert_close(trained(names["Distiller"], 2, 4), whole, atol=1e-4, rtol=0)

    base: Any = names["Distiller"]

    class Unweighted(base):  # type: ignore[misc]
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[Any, None]:
            return super().get_batch_samples(*args, **kwargs)[0], None

    assert (trained(Unweighted, 2, 4) - whole).abs().max() > 1e-3


RATE = 3e-3  # of the examples
LARGE_RATE = 1e-2  # at which AdamW makes 0.009 of the rounding of the stored values in 30 steps


def losses_by_step(folder: Path, teacher: str, rate: float) -> torch.Tensor:
    """The losses of a student, on the same batches with the same seed.

    Args:
        teacher: `cache`; `live`, its log-probabilities in float32; or `rounded`, these in float16.
    """
    cache = softcache.open(folder / "dense.h5")
    data = softcache.SoftLabelDataset(None, cache)
    live = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    student, found = gpt2(seed=3), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    loader = DataLoader(
        data, 8, shuffle=True, collate_fn=softcache.collate_tokens,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for _ in range(6):
        for batch in loader:
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = student(**given).logits
            if teacher == "cache":
                loss = batch_loss(cache, logits, batch)
            else:
                mask = batch["cache_rows"] >= 0
                with torch.no_grad():
                    targets = live(**given).logits[mask][:, : cache.classes].log_softmax(-1)
                if teacher == "rounded":
                    targets = targets.half().float().log_softmax(-1)
                loss = softcache.distillation_loss(
                    logits[mask][:, : cache.classes], targets, batch["row_labels"][mask],
                    temperature=1.0, alpha=0.9,
                ).total  # fmt: skip
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            found.append(loss.item())
    return torch.tensor(found)


def test_the_student_of_the_cache_is_that_of_the_live_teacher(folder: Path) -> None:
    ours, theirs = (losses_by_step(folder, teacher, RATE) for teacher in ("cache", "live"))
    assert ours[-1] < ours[0] - 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rate", [RATE, LARGE_RATE])
def test_only_the_rounding_of_the_stored_values_parts_the_two(folder: Path, rate: float) -> None:
    ours, theirs = (losses_by_step(folder, teacher, rate) for teacher in ("cache", "rounded"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

"""Models of tokens: padding, heads that run alone, and rows of what any model returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from softcache.data.rows import PADDING
from softcache.errors import ModelError
from softcache.models.language import TokenModel, flat_logits
from softcache.types import RowIndex

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    tiny = GPT2Config(
        vocab_size=50,
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return {
        "gpt2": GPT2LMHeadModel(tiny),
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)),
        "soft cap": Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=3.0, **SMALL)),
        "scale": CohereForCausalLM(CohereConfig(logit_scale=0.5, **SMALL)),
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "soft cap", "scale"])
def test_the_head_alone_gives_the_logits_of_the_model(name: str) -> None:
    model = TokenModel(models()[name], 45).eval()
    inputs = torch.tensor([[3, 4, 5, 6, 7], [8, 9, PADDING, PADDING, PADDING]])
    assert model.splits(inputs)
    with torch.no_grad():
        whole = model(inputs)  # (2, 5, 45)
        rows = torch.tensor([1, 4, 5])
        states = model(inputs, rows)
        alone = model.head(states)
        one_by_one = torch.cat([model.head(state[None]) for state in states])
    assert whole.shape == (2, 5, 45)
    torch.testing.assert_close(alone, whole.flatten(0, 1)[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one_by_one, alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # and the model is as it was
        torch.testing.assert_close(model(inputs), whole)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_changes_nothing(name: str) -> None:
    model = TokenModel(models()[name]).eval()
    with torch.no_grad():
        alone = model(torch.tensor([[8, 9]]))
        padded = model(torch.tensor([[8, 9, PADDING, PADDING], [3, 4, 5, 6]]))
    torch.testing.assert_close(padded[:1, :2], alone, atol=1e-5, rtol=1e-5)


def test_a_head_that_does_more_is_found_and_the_model_runs_as_a_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = models()["gpt2"]
    original = inner.forward

    def centred(**arguments: Tensor) -> object:
        """Logits that depend on all rows of the batch."""
        output = original(**arguments)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output

    inner.forward = centred
    model = TokenModel(inner)
    model.takes_names = True
    with caplog.at_level("INFO", "softcache"):
        assert not model.splits(torch.tensor([[3, 4, 5, 6]]))
    assert "gives other logits alone than within the model" in caplog.text


def test_more_tokens_than_the_model_takes_are_refused() -> None:
    model = TokenModel(models()["gpt2"])
    with pytest.raises(
        ModelError, match=r"has 33 tokens, and GPT2LMHeadModel takes at most 32; cut"
    ):
        model(torch.zeros((1, 33), dtype=torch.int64))


def test_a_token_without_an_embedding_is_refused() -> None:
    model = TokenModel(models()["gpt2"])
    with pytest.raises(
        ModelError, match="token id 50, and GPT2LMHeadModel has embeddings for 0 to 49"
    ):
        model(torch.tensor([[3, 50]]))


class Own(nn.Module):
    """A user's model of ids alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 7)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.embedding(ids)
        return logits


def test_an_own_module_gets_ids_without_padding() -> None:
    model = TokenModel(Own(), 7)
    inputs = torch.tensor([[8, 9, PADDING]])
    assert not model.splits(inputs)
    assert model(inputs).shape == (1, 3, 7)
    assert list(model.state_dict()) == ["embedding.weight"]


ROWS = RowIndex(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))


def test_rows_of_what_a_model_returns() -> None:
    output = torch.arange(24.0).view(2, 3, 4)
    inputs = torch.zeros(2, 3)
    assert flat_logits(output, inputs, ROWS, "it").tolist() == [
        output[0, 0].tolist(),
        output[0, 2].tolist(),
        output[1, 1].tolist(),
    ]


def test_pixels_of_a_smaller_output_are_resized() -> None:
    images = torch.zeros(2, 1, 4, 6)
    output = torch.randn(2, 5, 2, 3)
    rows = RowIndex(torch.tensor([0, 1]), torch.tensor([0, 23]))
    logits = flat_logits({"logits": output}, images, rows, "it")
    torch.testing.assert_close(logits[0], output[0, :, 0, 0])  # corners are corners
    torch.testing.assert_close(logits[1], output[1, :, 1, 2])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            torch.zeros(2, 4),
            r"it returns \(2, 4\) for a batch of 2; expected logits of shape \(2, pos",
        ),
        (torch.zeros(3, 3, 4), r"it returns \(3, 3, 4\) for a batch of 2"),
        ((1, 2), "it returns tuple for a batch of 2"),
        (torch.zeros(2, 2, 4), "returns 2 positions, and the data has rows up to position 2"),
    ],
)
def test_other_outputs_are_refused(output: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        flat_logits(output, torch.zeros(2, 3), ROWS, "it")

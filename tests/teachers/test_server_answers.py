"""The answers of vLLM and SGLang: right ones are read, and wrong ones are refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from softcache.errors import RemoteError
from softcache.teachers.server_answers import Question, read_answer


def entries(*pairs: tuple[object, object]) -> dict[str, Any]:
    """An entry of vLLM."""
    return {str(token): {"logprob": value, "rank": 1} for token, value in pairs}


def vllm(*rows: Any) -> dict[str, Any]:
    """An answer of vLLM."""
    return {"choices": [{"prompt_logprobs": list(rows)}]}


def sglang(*rows: Any, tokens: tuple[int, ...] = (5, 6, 7)) -> dict[str, Any]:
    """An answer of SGLang."""
    own = [[None, token, None] for token in tokens]
    return {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": list(rows)}}


QUESTION = Question("server", 4, (5, 6, 7), top=2, classes=10)
A, B = entries((6, -0.5), (1, -1.5)), entries((7, -0.5), (2, -1.5))
TOP_A, TOP_B = [[-0.5, 6, None], [-1.5, 1, None]], [[-0.5, 7, None], [-1.5, 2, None]]


def test_right_answers_are_read() -> None:
    for answer, api in ((vllm(None, A, B), "vllm"), (sglang(None, TOP_A, TOP_B), "sglang")):
        rows = read_answer(answer, api, QUESTION)
        assert rows.ids.tolist() == [[6, 1], [7, 2]]
        assert rows.log_probs.tolist() == [[-0.5, -1.5]] * 2


def test_of_equal_ones_the_smaller_id_is_kept() -> None:
    tied = entries((9, -1.2), (3, -1.2), (6, -1.2))
    rows = read_answer(vllm(None, tied, B), "vllm", QUESTION)
    assert rows.ids[0].tolist() == [3, 6]


def test_the_next_token_is_left_out_where_it_is_improbable() -> None:
    longer = entries((6, -9.0), (1, -0.5), (8, -1.0))
    rows = read_answer(vllm(None, longer, B), "vllm", QUESTION)
    assert rows.ids[0].tolist() == [1, 8]


def test_impossible_tokens_and_rounding_are_taken() -> None:
    odd = entries((6, 1e-6), (1, -9999.0))
    rows = read_answer(vllm(None, odd, B), "vllm", QUESTION)
    assert rows.log_probs[0].tolist() == [0.0, -9999.0]
    infinite = json.loads('{"6": {"logprob": 0.0}, "1": {"logprob": -Infinity}}')
    assert read_answer(vllm(None, infinite, B), "vllm", QUESTION).log_probs[0, 1] == -np.inf


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (vllm(None, A, entries((7, -0.5))), "document 4, position 1: 1 tokens, and top=2"),
        (vllm(None, A, {}), "position 1: 0 tokens"),
        (vllm(None, A, entries(*((n, -3) for n in range(5, 9)))), "position 1: 4 tokens.*one more"),
        (vllm(None, entries((" the", -1), ("6", -1)), B), "position 0: .*' the' by its text"),
        (vllm(None, entries(("token_id:6", -1), (1, -1)), B), "by its text; expected its id"),
        (vllm(None, entries((6, -1), (10, -1)), B), "token id 10, .*0 to 9: give the data the tokenizer"),
        (vllm(None, entries((6, 0.5), (1, -1)), B), "position 0: log-probability 0.5 of token 6"),
        (vllm(None, entries((6, float("nan")), (1, -1)), B), "position 0: log-probability nan"),
        (vllm(None, entries((6, None), (1, -1)), B), "log-probability nan"),
        (vllm(None, entries((6, "-1"), (1, -1)), B), "log-probability nan"),
        (vllm(None, entries((6, 10**400), (1, -1)), B), "log-probability nan"),
        (vllm(None, entries((6, True), (1, -1)), B), "log-probability nan"),
        (vllm(None, entries((6, float("inf")), (1, -1)), B), "log-probability inf"),
        (vllm(None, entries((6, -0.1), (1, -0.1)), B), "position 0: probabilities that sum to 1.81"),
        (vllm(None, entries((6, -1), ("06", -1)), B), "position 0: token 6 twice"),
        (vllm(None, A), "2 positions for 3 tokens"),
        (vllm(None, A, B, B), "4 positions for 3 tokens.*start token"),
        (vllm(A, B, None), "first token.*positions are shifted"),
        (vllm(None, B, A), "position 0: the entry does not have token 6, which comes next"),
        (vllm(None, A, None), "position 1: None in the place"),
        (vllm(None, A, [1, 2]), r"position 1: \[1, 2\] in the place"),
        (vllm(), "has no choices"),
        ({"choices": [{"text": "hello"}]}, "no chat server returns: serve the model with vLLM"),
        ({"choices": []}, "has no choices"),
        ([], "has no choices"),
        ("text", "has no choices"),
    ],
)  # fmt: skip
def test_an_answer_of_vllm_that_is_wrong_is_refused(answer: object, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        read_answer(answer, "vllm", QUESTION)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sglang(None, TOP_A, TOP_B[:1]), "position 1: 1 tokens, and top=2"),
        (sglang(None, [[-1.0, "a", None], [-1.0, 6, None]], TOP_B), "'a' by its text"),
        (sglang(None, [[-1.0, -3, None], [-1.0, 6, None]], TOP_B), "token id -3"),
        (sglang(None, [[-1.0], [-1.0, 6, None]], TOP_B), "in the place of log-probabilities"),
        (sglang(None, TOP_A), "2 positions for 3 tokens"),
        (sglang(TOP_A, TOP_B, None), "positions are shifted"),
        (sglang(None, TOP_A, TOP_B, tokens=(5, 7, 6)), r"speaks of \[None, 7, None\], and token 6"),
        (sglang(None, TOP_A, TOP_B, tokens=(5,)), "position 0: the answer speaks of None"),
        ({"meta_info": {}}, "has no meta_info.input_top_logprobs"),
        ({}, "has no meta_info.input_top_logprobs"),
    ],
)  # fmt: skip
def test_an_answer_of_sglang_that_is_wrong_is_refused(answer: object, message: str) -> None:
    with pytest.raises(RemoteError, match=message):
        read_answer(answer, "sglang", QUESTION)

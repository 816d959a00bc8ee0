"""Models of samples with many rows: language models, token classifiers, networks of frames and pixels.

A language model ends in a head of H x V weights, whose logits for all tokens of a batch would not fit into
memory. Here the head runs on a few rows at a time: hidden() gives the states of all rows, head() the logits
of some of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softcache.data.rows import PADDING
from softcache.errors import ModelError
from softcache.models.hub import keep_inner_names
from softcache.models.outputs import logits_of
from softcache.types import RowIndex
from softcache.util.log import inform

TOLERANCE = (
    1e-3  # relative to the largest logit: by how much the head may differ from the whole model
)
CHECKED_ROWS = 64


class TokenModel(nn.Module):
    """A model of token ids: from ids (B, L), padded with PADDING, to logits (B, L, C).

    Attributes:
        model: takes input_ids and attention_mask, as those of transformers do, or ids alone.
        vocabulary: the number of classes; logits beyond it belong to no token and are cut off.
        class_names: the model's names of its classes; empty for tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int | None = None,
        class_names: tuple[str, ...] = (),
        tokenizer: Any = None,  # noqa: ANN401  # of transformers, to be saved with the model
    ) -> None:
        super().__init__()
        self.model, self.vocabulary, self.class_names = model, vocabulary, class_names
        self.tokenizer = tokenizer
        self._splits: bool | None = None
        parameters = inspect.signature(model.forward).parameters
        self.takes_mask = "attention_mask" in parameters
        self.takes_names = "input_ids" in parameters
        self.takes_cache = "use_cache" in parameters
        keep_inner_names(self)

    def forward(self, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (B, L, C) of ids (B, L); or the hidden states (R, H) of `rows` (R,), numbered b · L + i."""
        if rows is None:
            return self._cut(_tensor(self.model(*self._arguments(inputs), **self._options(inputs))))
        return self._states(inputs).flatten(0, 1)[rows]

    @property
    def base(self) -> nn.Module | None:
        """The part before the head, if the model is one of transformers that has both; else None."""
        base = getattr(self.model, "base_model", None)
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        return base if head is not None and base is not self.model else None

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that head() uses."""
        base = self.base
        own = {id(p) for p in base.parameters()} if base is not None else set()
        tied: Any = self.model.get_output_embeddings() if base is not None else None  # type: ignore[operator]
        used = {id(p): p for p in (tied.parameters() if tied is not None else ())}
        used |= {id(p): p for p in self.model.parameters() if id(p) not in own}
        return [p for p in used.values() if p.requires_grad]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (n, C) of hidden states (n, H), with the caps and scales of the model itself."""
        ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with _replaced_base(self.base, hidden[None]):
            return self._cut(_tensor(self.model(input_ids=ids, **self._no_cache())))[0]

    def linear_head(self, states: Tensor) -> tuple[Tensor, Tensor] | None:
        """The matrix (C, H) and the bias (C,) of the head, if logits are W h + b; tried on states (n, H).

        Returns:
            Both in float32; None for a head that does anything else, such as a cap.
        """
        layer: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != states.shape[1]:
            return None
        own_bias = getattr(layer, "bias", None)
        with torch.no_grad():
            weight = self._cut(weight.detach().float().T).T
            bias = (
                weight.new_zeros(len(weight))
                if own_bias is None
                else self._cut(own_bias.detach().float())
            )
            few = states[:CHECKED_ROWS].to(weight.dtype)
            expected, linear = self.head(few).float(), few @ weight.T + bias
        scale = max(1.0, float(expected.abs().max()))
        return (
            (weight, bias) if bool((expected - linear).abs().max() <= TOLERANCE * scale) else None
        )

    def splits(self, inputs: Tensor) -> bool:
        """Whether the head alone gives the logits of the whole model; tried once, on the first batch."""
        if self._splits is None:
            self._splits = self.base is not None and self._agrees(inputs)
            if self.base is not None and not self._splits:
                inform(
                    f"note: the head of {type(self.model).__name__} gives other logits alone than within the "
                    "model, so the logits of whole batches are computed at once; if memory runs out, lower "
                    "--batch-tokens"
                )
        return self._splits

    def _agrees(self, inputs: Tensor) -> bool:
        was_training, few = self.training, inputs[:1, :CHECKED_ROWS]
        try:
            self.eval()
            with torch.no_grad():
                whole = self(few)[0].float()
                rows = torch.arange(len(whole), device=inputs.device)
                states = self(few, rows)
                # in two parts, since a head may mix rows
                half = len(states) // 2
                parts = [self.head(part) for part in (states[:half], states[half:]) if len(part)]
                alone = torch.cat(parts).float()
        except Exception:  # a model may do anything in its head; then it is run as a whole
            return False
        finally:
            self.train(was_training)
        scale = float(whole.abs().max())
        return alone.shape == whole.shape and bool(
            (alone - whole).abs().max() <= TOLERANCE * max(1.0, scale)
        )

    def _states(self, inputs: Tensor) -> Tensor:
        base = self.base
        if base is None:
            raise ModelError(f"{type(self.model).__name__} has no head of its own")
        output = base(*self._arguments(inputs), **self._options(inputs))
        states: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return states

    @property
    def context(self) -> int | None:
        """The most tokens that the model takes; None if it does not say."""
        config = getattr(self.model, "config", None)
        length = getattr(config, "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    def _check_ids(self, inputs: Tensor) -> None:
        """Raise ModelError for a token without an embedding, which would stop a GPU for good."""
        layer: Any = getattr(self.model, "get_input_embeddings", lambda: None)()
        count = getattr(layer, "num_embeddings", None)
        if count is not None and inputs.numel() and int(inputs.max()) >= count:
            raise ModelError(
                f"the data has token id {int(inputs.max()):,}, and {type(self.model).__name__} has "
                f"embeddings for 0 to {count - 1:,}; make the tokens with the model's own tokenizer"
            )

    def _arguments(self, inputs: Tensor) -> tuple[Tensor, ...]:
        self._check_ids(inputs)
        if self.context is not None and inputs.shape[1] > self.context:
            raise ModelError(
                f"a sample has {inputs.shape[1]:,} tokens, and {type(self.model).__name__} takes at most "
                f"{self.context:,}; cut samples with ?length={self.context}, or give a model with more"
            )
        return () if self.takes_names else (inputs.clamp(min=0),)

    def _options(self, inputs: Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {"input_ids": inputs.clamp(min=0)} if self.takes_names else {}
        if self.takes_mask:
            options["attention_mask"] = (inputs != PADDING).long()
        return options | self._no_cache()

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.takes_cache else {}

    def _cut(self, logits: Tensor) -> Tensor:
        return logits if self.vocabulary is None else logits[..., : self.vocabulary]


class _States:
    """What stands for the output of the part before the head: its last states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, part: int | slice) -> Any:  # noqa: ANN401  # as a tuple of outputs
        return (self.last_hidden_state,)[part]

    def __getattr__(self, name: str) -> None:
        """Every other output is absent."""
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced_base(base: nn.Module | None, states: Tensor) -> Iterator[None]:
    """Let the part before the head return these states (1, n, H), whatever it is called with."""
    if base is None:
        raise ModelError("the model has no head of its own")
    base.forward = lambda *_, **__: _States(states)
    try:
        yield
    finally:
        del base.forward  # the method of the class is back


def _tensor(output: object) -> Tensor:
    logits = logits_of(output)
    if isinstance(logits, tuple) and logits and isinstance(logits[0], Tensor):
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise ModelError(f"the model returned {type(output).__name__}; expected a tensor of logits")
    return logits


def flat_logits(
    output: object, inputs: Tensor, rows: RowIndex, who: str, expected: int | None = None
) -> Tensor:
    """The logits of some rows, (R, C), from what a model returns for a batch.

    Args:
        output: (B, P, C), or (B, C, h, w) for images (B, channels, H, W), which is resized to H x W.
        inputs: the batch, (B, *shape).
        rows: which rows are wanted.
        who: the model, for messages.
        expected: how many positions it must return, if that is known; others would not be those of the rows.

    Raises:
        ModelError: the output has another shape, too few positions, or others than expected.
    """
    logits = logits_of(output)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim not in (3, 4) or len(logits) != len(inputs):
        raise ModelError(
            f"{who} returns {shape} for a batch of {len(inputs)}; expected logits of shape ({len(inputs)}, "
            "positions, classes), or (samples, classes, height, width) for images"
        )
    if logits.ndim == 4:
        size = inputs.shape[-2:]
        if logits.shape[-2:] != size:
            logits = functional.interpolate(
                logits.float(), size, mode="bilinear", align_corners=False
            )
        logits = logits.flatten(2).transpose(1, 2)  # (B, H · W, C)
    positions = logits.shape[1]
    if len(rows.positions) and int(rows.positions.max()) >= positions:
        raise ModelError(
            f"{who} returns {positions} positions, and the data has rows up to position "
            f"{int(rows.positions.max())}; expected an output for each of them"
        )
    if expected is not None and positions != expected:
        raise ModelError(
            f"{who} returns {positions} positions, and the data has rows at {expected}; expected as many, or "
            "they would be about other places"
        )
    return logits.flatten(0, 1)[rows.flat(positions).to(logits.device)]

"""Memory and time of the loss and of the dump of a language model with a large vocabulary.

Each part runs in a process of its own, whose peak memory is compared with what the models need. The step in
chunks is compared with the same step on whole logits where these fit into memory, and with a plain
cross-entropy on whole logits in turns, A B A B.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from softcache.cache import parse_encoding
from softcache.chunked_loss import chunked_loss
from softcache.losses import reduce_losses, row_losses
from softcache.models.language import TokenModel
from softcache.targets.encode import make_encoder, soften
from softcache.types import RowIndex, SparseTargets
from tests.bench import machine

LARGE, TOKENS, LENGTH = 152_064, 4096, 512  # of the measurement of memory
PAIRS = 7


def main() -> None:
    """Run the parts, and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--width", type=int, default=64, help="of the models")
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](options.width)
        return
    print(machine())
    for part in PARTS:
        command = [sys.executable, "-m", "tests.bench.token_memory", "--part", part]
        root = Path(__file__).parent.parent.parent
        subprocess.run([*command, "--width", str(options.width)], check=True, cwd=root)


def model_of(vocabulary: int, width: int, layers: int = 1) -> TokenModel:
    """A GPT-2 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=layers,
        n_head=2,
        n_embd=width,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return TokenModel(GPT2LMHeadModel(config), vocabulary)


def batch_of(vocabulary: int, tokens: int) -> tuple[Tensor, RowIndex]:
    """Token ids (B, LENGTH), and all their positions as rows."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, vocabulary, (tokens // LENGTH, LENGTH), generator=generator)
    samples = torch.arange(len(inputs)).repeat_interleave(LENGTH)
    return inputs, RowIndex(samples, torch.arange(LENGTH).repeat(len(inputs)))


def targets_of(vocabulary: int, rows: int, k: int = 50) -> SparseTargets:
    """Soft targets of k random tokens a row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(rows, vocabulary // 64, generator=generator).topk(k).indices * 64
    log_probs = torch.log_softmax(torch.randn(rows, k, generator=generator), -1) - 0.05
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=1e-9).log() - torch.tensor(vocabulary - k).log()
    return SparseTargets(ids, log_probs, rest, vocabulary)


def student_step(
    model: TokenModel,
    inputs: Tensor,
    rows: RowIndex,
    targets: SparseTargets,
    labels: Tensor,
    **how: Any,
) -> Tensor:
    """Loss and gradients of a step in chunks; returns the loss."""
    states = model(inputs, rows.flat(inputs.shape[1]))
    loss = chunked_loss(
        states,
        model.head,
        model.head_parameters(),
        labels,
        targets,
        classes=targets.classes,
        temperature=1.0,
        alpha=0.5,
        **how,
    )
    loss.total.backward()  # type: ignore[no-untyped-call]
    return loss.total.detach()


def peak() -> float:
    """The peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_of_training(width: int) -> None:
    """Peak memory of a training step with a vocabulary of LARGE, beyond the model and its gradients."""
    model = model_of(LARGE, width)
    inputs, rows = batch_of(LARGE, TOKENS)
    targets, labels = targets_of(LARGE, TOKENS), inputs.flatten()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak()
    loss = student_step(model, inputs, rows, targets, labels)
    print(
        f"training step, V = {LARGE:,}, {TOKENS:,} tokens, width {width}: {peak() - before:,.0f} MB beyond "
        f"the model and its gradients (whole logits would take {TOKENS * LARGE * 4 / 2**20:,.0f} MB each); "
        f"loss {loss:.4f}"
    )


def memory_of_dump(width: int) -> None:
    """Peak memory of the teacher's rows and their encoding, beyond the model."""
    model = model_of(LARGE, width).eval()
    inputs, rows = batch_of(LARGE, TOKENS)
    before = peak()
    for spec in ("sampled:50", "topk:64"):
        encode = make_encoder(
            parse_encoding(spec, 1.0), {}, temperature=1.0, seed=0, device=torch.device("cpu")
        )
        stored = []
        with torch.inference_mode():
            states = model(inputs, rows.flat(LENGTH))
            size = max(1, (1 << 24) // LARGE)
            for start in range(0, len(states), size):
                log_probs = soften(model.head(states[start : start + size]), 1.0)
                part = slice(start, start + len(log_probs))
                ids = rows.samples[part].numpy()
                stored.append(encode(log_probs, 0, ids, rows.positions[part].numpy()))
        print(
            f"dump, {spec}, V = {LARGE:,}, {TOKENS:,} tokens, width {width}: {peak() - before:,.0f} MB "
            "beyond the model"
        )


def equality(width: int) -> None:
    """Chunked against whole, on fewer tokens: loss and gradients."""
    inputs, rows = batch_of(LARGE, LENGTH)
    targets, labels = targets_of(LARGE, LENGTH), inputs.flatten()
    model = model_of(LARGE, width)
    chunked = student_step(model, inputs, rows, targets, labels)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = row_losses(model(inputs).flatten(0, 1), targets, labels, temperature=1.0, alpha=0.5)
    whole = reduce_losses(losses, temperature=1.0, alpha=0.5).total
    whole.backward()  # type: ignore[no-untyped-call]
    worst = max(
        float((p.grad - gradients[name]).abs().max() / p.grad.abs().max())
        for name, p in model.named_parameters()
        if p.grad is not None
    )
    difference = abs(float(chunked) - float(whole.detach()))
    print(
        f"in chunks against whole, V = {LARGE:,}: loss differs by {difference:.1e}, "
        f"gradients by at most {worst:.1e} of the largest"
    )


def speed(width: int) -> None:
    """Time of a step on soft targets in chunks against plain cross-entropy on whole logits, in turns."""
    vocabulary, tokens = 32_000, 2048
    model = model_of(vocabulary, 4 * width, layers=2)
    inputs, rows = batch_of(vocabulary, tokens)
    labels = inputs.flatten()
    kinds = {
        "hard labels in chunks": lambda: chunk_step(model, inputs, rows, None, labels, alpha=0.0),
        "KL of topk:50 in chunks": lambda: chunk_step(
            model, inputs, rows, targets_of(vocabulary, tokens), labels, alpha=1.0
        ),
    }
    prepared = targets_of(vocabulary, tokens)
    kinds["KL of topk:50 in chunks"] = lambda: chunk_step(
        model, inputs, rows, prepared, labels, alpha=1.0
    )

    def plain() -> None:
        model.zero_grad()
        functional.cross_entropy(model(inputs).flatten(0, 1), labels).backward()  # type: ignore[no-untyped-call]

    for name, step in kinds.items():
        ratios = []
        for pair in range(PAIRS + 1):
            times = []
            for run in (plain, step):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            if pair:
                ratios.append(times[1] / times[0])
        print(
            f"{name}, V = {vocabulary:,}, width {4 * width}, {tokens:,} tokens, against cross-entropy on "
            f"whole logits: {statistics.median(ratios):.2f} of its time ({min(ratios):.2f} to "
            f"{max(ratios):.2f})"
        )


def chunk_step(
    model: TokenModel,
    inputs: Tensor,
    rows: RowIndex,
    targets: SparseTargets | None,
    labels: Tensor,
    *,
    alpha: float,
) -> None:
    """A step in chunks."""
    model.zero_grad()
    loss = chunked_loss(
        model(inputs, rows.flat(inputs.shape[1])),
        model.head,
        model.head_parameters(),
        labels,
        targets,
        classes=model.vocabulary or 0,
        temperature=1.0,
        alpha=alpha,
    )
    loss.total.backward()  # type: ignore[no-untyped-call]


PARTS = {
    "training": memory_of_training,
    "dump": memory_of_dump,
    "equality": equality,
    "speed": speed,
}

if __name__ == "__main__":
    main()

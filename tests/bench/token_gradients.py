"""How far the gradient of a student of a cache is from that of full distillation, by encoding and bytes.

    python -m tests.bench.language_model work
    python -m tests.bench.token_gradients work/teacher --data "jsonl:work/test.jsonl?text=text&length=256"

The teacher runs on a few batches of documents. For each encoding, its rows are encoded and decoded, and the
gradient of a small student's loss is compared with that of the same loss on the teacher's own rows: the angle
between the two, and the ratio of their norms. The student was trained on the labels of other documents for
a few steps, so that it is neither random nor finished.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.cache import TopK
from softcache.cache.encodings import row_bytes
from softcache.chunked_loss import chunked_loss
from softcache.data.augment import parse_augment
from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.dump.fit_head import head_directions
from softcache.dump.prepare import draft_header, load_teachers
from softcache.dump.select_encoding import most_directions, needs_rows, select
from softcache.models.build import build
from softcache.models.language import TokenModel
from softcache.targets.decode import class_ids, decode
from softcache.targets.encode import make_encoder
from softcache.teachers.ensemble import Ensemble
from softcache.types import RowIndex, SparseTargets, Targets
from tests.bench import machine

ENCODINGS = (
    "topk:2", "topk:6", "topk:12", "topk:24", "topk:64", "topk:100",
    "sampled:4", "sampled:12", "sampled:18", "sampled:50", "sampled:128",
    "packed:8", "packed:12", "packed:16", "packed:20", "packed:26", "packed:36", "packed:64", "packed:92",
    "packed:128", "packed:256", "packed:400",
    "basis:8,4", "basis:16,4", "basis:32,4", "basis:64,8", "basis:128,8", "basis:256,16",
)  # fmt: skip
STUDENT = (
    "hf:gpt2?pretrained=false&n_layer=2&n_head=2&n_embd=64&resid_pdrop=0&embd_pdrop=0&attn_pdrop=0"
)
CUT = "topk:12 cut, without a tail"
REPLACED = "50 draws with replacement"


@dataclass(frozen=True)
class Batch:
    """Documents, the rows of their tokens, and what the teacher says of these."""

    inputs: Tensor  # (B, L)
    rows: RowIndex
    labels: Tensor  # (R,)
    log_probs: Tensor  # (R, C)
    samples: np.ndarray  # (R,)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path, help="a folder of a language model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--documents", type=int, default=8, help="of a batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of the student on labels")
    parser.add_argument("--encodings", nargs="+", default=list(ENCODINGS))
    parser.add_argument("--out", type=Path, help="a file for the angles, for token_plot")
    options = parser.parse_args()
    config = DumpConfig(
        teacher=f"hf:{options.teacher}", data=options.data, temperature=1.0, out=Path("none.h5")
    )
    source = open_source(options.data, defaults={"tokenizer": str(options.teacher)})
    teacher = load_teachers(config, source, parse_augment(None, seed=0, total=len(source)))
    chosen = np.random.default_rng(0).permutation(len(source))
    used = options.documents * options.batches
    batches = [
        teacher_batch(teacher, source, chosen[start : start + options.documents])
        for start in range(0, used, options.documents)
    ]
    student = student_of(source, teacher.classes, chosen[used:], options.steps)
    exact = [gradient(student, batch, batch.log_probs) for batch in batches]
    rows = []
    for spec in (*options.encodings, CUT, REPLACED):
        size, targets = encoded(config, source, teacher, batches, spec)
        angles, ratios = [], []
        for batch, given, reference in zip(batches, targets, exact, strict=True):
            found = gradient(student, batch, given)
            cosine = float(found @ reference / (found.norm() * reference.norm()))
            angles.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
            ratios.append(float(found.norm() / reference.norm()))
        rows.append((spec, size, statistics.fmean(angles), max(angles), statistics.fmean(ratios)))
        print(rows[-1], flush=True)
    if options.out:
        points = [(spec, size, angle) for spec, size, angle, *_ in rows]
        options.out.write_text(json.dumps({"classes": teacher.classes, "angles": points}))
    tokens = sum(len(batch.labels) for batch in batches)
    print(machine())
    print(f"{tokens:,} tokens in {len(batches)} batches, V = {teacher.classes:,}")
    headers = ("encoding", "bytes a token", "angle in degrees", "largest", "norm ratio")
    rows.sort(key=lambda row: (row[0].partition(":")[0], row[1]))
    print(tabulate(rows, headers=headers, floatfmt=("", ".0f", ".1f", ".1f", ".3f")))


def teacher_batch(teacher: Ensemble, source: Source, samples: np.ndarray) -> Batch:
    """Run the teacher on some documents."""
    (batch,) = loader(source, [samples.tolist()])
    rows = RowIndex(batch.row_samples, batch.row_positions)
    log_probs = torch.cat(list(teacher.row_log_probs(batch.inputs, rows, 1.0))).clone()
    return Batch(batch.inputs, rows, batch.labels, log_probs, samples[batch.row_samples.numpy()])


def student_of(source: Source, classes: int, samples: np.ndarray, steps: int) -> TokenModel:
    """A small student after some steps on labels."""
    torch.manual_seed(0)
    student = build(STUDENT, input_shape=(1,), classes=classes, unit="token")
    if not isinstance(student, TokenModel):
        raise TypeError("the student takes no tokens")
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    random = np.random.default_rng(1)
    for _ in range(steps):
        (batch,) = loader(source, [random.choice(samples, 8).tolist()])
        rows = RowIndex(batch.row_samples, batch.row_positions)
        optimizer.zero_grad()
        loss_of(student, batch.inputs, rows, batch.labels, None).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student


def loss_of(
    student: TokenModel,
    inputs: Tensor,
    rows: RowIndex,
    labels: Tensor,
    targets: Targets | None,
) -> Tensor:
    """The mean KL to the targets, or the cross-entropy without any."""
    student.splits(inputs)
    return chunked_loss(
        student(inputs, rows.flat(inputs.shape[1])),
        student.head,
        student.head_parameters(),
        labels,
        targets,
        classes=student.vocabulary or 0,
        temperature=1.0,
        alpha=0.0 if targets is None else 1.0,
    ).total


def gradient(student: TokenModel, batch: Batch, targets: Targets) -> Tensor:
    """The gradient of the loss on a batch, flat."""
    student.zero_grad()
    loss_of(student, batch.inputs, batch.rows, batch.labels, targets).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


Codec = Callable[[Tensor, npt.NDArray[np.int64], Tensor, int], Targets]


def encoded(
    config: DumpConfig, source: Source, teacher: Ensemble, batches: Sequence[Batch], spec: str
) -> tuple[int, list[Targets]]:
    """Bytes a row of an encoding, and the batches' rows as it gives them back."""
    if spec == CUT:
        return 12 * 4, [cut(batch.log_probs, 12) for batch in batches]
    if spec == REPLACED:
        return drawn_with_replacement(batches, 50)
    every = torch.cat([batch.log_probs for batch in batches])
    size, codec = make_codec(config, source, teacher, every[:1024], spec)
    return size, [
        codec(batch.log_probs, batch.samples, batch.rows.positions, 0) for batch in batches
    ]


def make_codec(
    config: DumpConfig, source: Source, teacher: Ensemble, log_probs: Tensor, spec: str
) -> tuple[int, Codec]:
    """Bytes a row of an encoding, and what encodes rows and decodes them again.

    Args:
        log_probs: (R, C) rows that an encoding is fitted to.

    Returns:
        The bytes, and (log-probabilities (R, C), samples (R,), positions (R,), view) -> soft targets.
    """
    classes = teacher.classes
    draft = draft_header(replace(config, encoding=spec), source, teacher)
    directions = None
    if needs_rows(spec):
        directions = head_directions(draft, source, teacher, most_directions(spec))
    encoding, shared, _ = select(
        spec, log_probs, temperature=1.0, seed=0, max_kl=1.0, directions=directions
    )
    size = row_bytes(encoding, classes)
    encode = make_encoder(encoding, shared, temperature=1.0, seed=0, device=torch.device("cpu"))
    floats = {name: tensor.float() for name, tensor in shared.items()}

    def codec(
        log_probs: Tensor, samples: npt.NDArray[np.int64], positions: Tensor, view: int
    ) -> Targets:
        stored = encode(log_probs, view, samples, positions.numpy())
        if "ids" in stored:
            stored["ids"] = class_ids(stored["ids"], classes)
        targets = decode(encoding, stored | floats, temperature=1.0, wanted=1.0, classes=classes)
        if isinstance(encoding, TopK) and isinstance(targets, SparseTargets):
            return replace(targets, bucket=True)
        return targets

    return size, codec


def cut(log_probs: Tensor, k: int) -> SparseTargets:
    """The k largest classes alone, divided by their sum, as most tools store them."""
    top, ids = log_probs.topk(k)
    nothing = torch.full_like(top[:, 0], -torch.inf)
    return SparseTargets(ids, torch.log_softmax(top, -1), nothing, log_probs.shape[1])


def drawn_with_replacement(batches: Sequence[Batch], n: int) -> tuple[int, list[Targets]]:
    """n independent draws of each row, as ids and counts in 3 bytes a class, on the average.

    Random sampling knowledge distillation, Anshumann et al., "Sparse logit sampling" (ACL 2025).
    """
    targets: list[Targets] = []
    generator, stored = torch.Generator().manual_seed(0), 0
    for batch in batches:
        ids = torch.multinomial(batch.log_probs.exp(), n, replacement=True, generator=generator)
        counts = torch.zeros_like(batch.log_probs)
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
        stored += int((counts > 0).sum())
        targets.append((counts / n).log())
    return round(3 * stored / sum(len(batch.labels) for batch in batches)), targets


if __name__ == "__main__":
    main()

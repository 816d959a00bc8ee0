"""Students of every kind of soft targets next to those of labels and of the live teacher, in one pass.

    python -m tests.bench.language_model work
    python -m tests.bench.token_students work --seed 0
    python -m tests.bench.token_students work --seed 1
    python -m tests.bench.token_students work --table

and over several epochs of few documents, with draws that are seen again and again, or not:

    python -m tests.bench.token_students work --name draws --documents 250 --epochs 8 --kinds "hard labels" \
        "live teacher" packed:16 packed:16*2 packed:16*4 packed:16*8

Each batch goes through the teacher once. Its log-probabilities are encoded and decoded as a cache would, and
one student for each encoding learns from them; all start from the same weights. A seed changes these and the
order of the documents. With *N after an encoding, epochs take turns with N views. Finished seeds are kept in
work/students-SEED.json. A student is judged on test documents: the cross-entropy, the expected calibration
error, and how often speculative decoding with it would accept a token.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.data.loader import Batch, loader
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.models.build import build
from softcache.models.calibration import calibration_of
from softcache.models.language import TokenModel
from softcache.teachers.ensemble import Ensemble
from softcache.types import RowIndex
from tests.bench import machine
from tests.bench.language_model import STUDENT, data
from tests.bench.token_encodings import live_teacher
from tests.bench.token_gradients import Codec, cut, loss_of, make_codec

HARD, LIVE, CUT = "hard labels", "live teacher", "topk:12, cut"
KINDS = (
    HARD, LIVE, CUT, "topk:12", "topk:64", "sampled:18", "packed:16", "packed:26", "packed:36", "basis:32,4",
    "basis:64,8",
)  # fmt: skip
WARMUP = 0.05  # of the steps
DOCUMENTS = 160  # of the test text

Figures = dict[str, dict[str, float]]  # by the kind of soft targets


def main() -> None:
    """Train the students of a seed, or print the table of all finished seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="documents of a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--documents", type=int, help="of the training text (default: all)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--name", default="students", help="of the files with the figures")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--table", action="store_true", help="of all seeds, without training")
    options = parser.parse_args()
    folder: Path = options.folder
    if not options.table:
        plan = Plan(
            options.student,
            options.seed,
            options.batch,
            options.lr,
            options.documents,
            options.epochs,
        )
        figures = trained(folder, options.kinds, plan)
        (folder / f"{options.name}-{options.seed}.json").write_text(json.dumps(figures, indent=1))
    files = sorted(folder.glob(f"{options.name}-*.json"))
    seeds = [json.loads(file.read_text()) for file in files]
    print(machine())
    print(table(seeds))


@dataclass(frozen=True)
class Plan:
    """How students are trained."""

    student: str
    seed: int
    batch: int  # documents
    lr: float
    documents: int | None
    epochs: int


def trained(folder: Path, kinds: Sequence[str], plan: Plan) -> Figures:
    """Train a student of each kind of soft targets on the text, and judge it."""
    source, test = open_source(data(folder, "train.jsonl")), open_source(data(folder, "test.jsonl"))
    teacher = live_teacher(folder)
    random = np.random.default_rng(plan.seed)
    order = random.permutation(len(source))[: plan.documents]
    steps_of_epoch = len(order) // plan.batch
    steps = steps_of_epoch * plan.epochs
    sizes, codecs = make_codecs(folder, source, teacher, kinds)
    torch.manual_seed(plan.seed)
    students = {kind: new_student(plan.student, teacher.classes) for kind in kinds}
    for student in students.values():
        student.load_state_dict(students[HARD].state_dict())
    optimizers = {kind: torch.optim.AdamW(s.parameters(), plan.lr) for kind, s in students.items()}
    tokens, start = 0, time.perf_counter()
    for step in range(steps):
        epoch, place = divmod(step, steps_of_epoch)
        if epoch and not place:
            order = random.permutation(order)
        chosen = order[place * plan.batch :][: plan.batch]
        (batch,) = loader(source, [chosen.tolist()])
        rows = RowIndex(batch.row_samples, batch.row_positions)
        log_probs = teacher_log_probs(teacher, batch)
        samples = chosen[rows.samples.numpy()]
        share = (step + 1) / steps
        rate = plan.lr * min(share / WARMUP, (1 + math.cos(math.pi * share)) / 2)
        for kind, student in students.items():
            targets = (
                None if kind == HARD else codecs[kind](log_probs, samples, rows.positions, epoch)
            )
            optimizer = optimizers[kind]
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            torch.manual_seed(step)  # the same dropout for all
            loss_of(student, batch.inputs, rows, batch.labels, targets).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        tokens += len(batch.labels)
        if step % 20 == 19:
            left = (time.perf_counter() - start) * (1 / share - 1)
            print(
                f"seed {plan.seed}, step {step + 1} of {steps}, {tokens:,} tokens, {left:,.0f} s left"
            )
    figures = judged(students, teacher, test)
    for kind, size in sizes.items():
        figures[kind] |= {"bytes": size}
    print(f"{tokens:,} tokens")
    return figures


def new_student(spec: str, classes: int) -> TokenModel:
    """A student, not yet trained."""
    student = build(spec, input_shape=(1,), classes=classes, unit="token")
    if not isinstance(student, TokenModel):
        raise TypeError("the student takes no tokens")
    return student


def make_codecs(
    folder: Path, source: Source, teacher: Ensemble, kinds: Sequence[str]
) -> tuple[dict[str, int], dict[str, Codec]]:
    """Bytes a token and the codec of each kind of soft targets, but hard labels."""
    config = DumpConfig(
        teacher=f"hf:{folder / 'teacher'}", data="-", temperature=1.0, out=folder / "none.h5"
    )
    (batch,) = loader(source, [list(range(0, len(source), len(source) // 8))])
    log_probs = teacher_log_probs(teacher, batch)[:1024]
    sizes: dict[str, int] = {}
    codecs: dict[str, Codec] = {}
    for kind in kinds:
        if kind == CUT:
            sizes[kind], codecs[kind] = 12 * 4, lambda log_probs, *_: cut(log_probs, 12)
        elif kind == LIVE:
            codecs[kind] = lambda log_probs, *_: log_probs
        elif kind != HARD:
            spec, _, views = kind.partition("*")
            sizes[kind], codec = make_codec(config, source, teacher, log_probs, spec)
            codecs[kind] = in_turn(codec, int(views or 1))
    return sizes, codecs


def in_turn(codec: Codec, views: int) -> Codec:
    """The same, whose epochs take turns with a number of views."""
    return lambda log_probs, samples, positions, epoch: codec(
        log_probs, samples, positions, epoch % views
    )


def teacher_log_probs(teacher: Ensemble, batch: Batch) -> Tensor:
    """What the teacher says of the rows of a batch, (R, C)."""
    rows = RowIndex(batch.row_samples, batch.row_positions)
    return torch.cat(list(teacher.row_log_probs(batch.inputs, rows, 1.0))).clone()


@torch.inference_mode()
def judged(students: dict[str, TokenModel], teacher: Ensemble, test: Source) -> Figures:
    """The cross-entropy, calibration and acceptance of students on test documents."""
    chosen = np.linspace(0, len(test) - 1, min(DOCUMENTS, len(test))).astype(int)
    sums: dict[str, Any] = {kind: [] for kind in [*students, "teacher"]}
    for part in np.array_split(chosen, max(1, len(chosen) // 4)):
        (batch,) = loader(test, [part.tolist()])
        log_p = teacher_log_probs(teacher, batch)
        for kind, student in students.items():
            student.eval()
            student.splits(batch.inputs)
            rows = RowIndex(batch.row_samples, batch.row_positions)
            states = student(batch.inputs, rows.flat(batch.inputs.shape[1]))
            sums[kind].append(
                scored(torch.log_softmax(student.head(states), -1), log_p, batch.labels)
            )
        sums["teacher"].append(scored(log_p, log_p, batch.labels))
    figures = {}
    for kind, parts in sums.items():
        loss, accepted, confidence, correct = torch.cat(parts, 1).double().numpy()
        ece = calibration_of(confidence, correct).error
        figures[kind] = {"loss": loss.mean(), "ece": ece, "acceptance": accepted.mean()}
    return figures


def scored(log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
    """The loss of each row, the mass shared with the teacher, confidence, and 1 if correct, (4, R)."""
    loss = -log_q.gather(1, labels[:, None])[:, 0]
    top = log_q.max(-1)
    shared = torch.minimum(log_p, log_q).exp().sum(-1)
    return torch.stack([loss, shared, top.values.exp(), (top.indices == labels).float()])


def table(seeds: Sequence[Figures]) -> str:
    """The figures of all kinds: mean and spread over the seeds."""
    rows = []
    for kind in sorted(
        seeds[0], key=lambda kind: -statistics.fmean(s[kind]["loss"] for s in seeds)
    ):
        own = [seed[kind] for seed in seeds]
        row = [kind, seeds[0][kind].get("bytes", "-"), spread([f["loss"] for f in own], "{:.4f}")]
        shares = [
            100 * (s[HARD]["loss"] - s[kind]["loss"]) / (s[HARD]["loss"] - s[LIVE]["loss"])
            for s in seeds
        ]
        row.append("-" if kind in (HARD, "teacher") else spread(shares, "{:.1f}") + " %")
        row.append(spread([100 * f["ece"] for f in own], "{:.2f}"))
        row.append(spread([100 * f["acceptance"] for f in own], "{:.2f}"))
        rows.append(row)
    headers = ("soft targets", "bytes", "test loss", "of the way", "ECE in %", "acceptance in %")
    return tabulate(rows, headers=headers, disable_numparse=True) + f"\n{len(seeds)} seeds"


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the standard deviation if there are several."""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


if __name__ == "__main__":
    main()

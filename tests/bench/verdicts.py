"""Wrong caches that must be warned of, and right ones that must not: on MNIST, and on a folder of images.

For each data set a teacher is trained, or its weights are given. A trial takes a random part of the
evaluation data and judges the teacher's predictions on it: as they are, or with its classes in a random
order, the labels shifted by one, or the rows shuffled. Among the right trials are weak teachers (40 to
70 % accuracy) and labels of which a fifth to two fifths are random.

    python -m tests.bench.verdicts
    python -m tests.bench.verdicts --train folder:cifar/train --eval-data folder:cifar/test
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tabulate import tabulate
from torch import nn

from softcache.cache.verdict import Predictions, judge
from softcache.data.loader import loader, sequential_batches
from softcache.data.open import open_source
from softcache.models.build import build
from softcache.models.weights import load_weights
from softcache.util.tensors import to_float

ROOT = Path(__file__).parents[2]
FEWEST = 200  # rows of a trial
WEAK = (0.4, 0.7)  # accuracy of a weak teacher
WEAK_SIZES = (
    60,
    100,
    150,
    250,
    400,
    700,
    1200,
    2000,
)  # training samples of a weak teacher, tried in turn

Integers = npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train", default=f"idx:{ROOT / 'data' / 'mnist'}")
    parser.add_argument("--eval-data", default=f"idx:{ROOT / 'data' / 'mnist'}@test")
    parser.add_argument("--teacher", default="cnn:16x2,32x2", help="architecture of the teachers")
    parser.add_argument("--weights", type=Path, help="weights of the teacher; trained if left out")
    parser.add_argument("--samples", type=int, default=10_000, help="training samples")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--weak-samples", type=int, nargs="+", default=WEAK_SIZES)
    parser.add_argument("--weak", type=int, default=10, help="weak teachers to train")
    parser.add_argument("--trials", type=int, default=100, help="trials of each kind")
    options = parser.parse_args()
    torch.manual_seed(0)
    inputs, labels = load(options.train, options.samples)
    eval_inputs, eval_labels = load(options.eval_data, 10_000)
    classes = int(labels.max()) + 1
    if options.weights:
        model = build(options.teacher, input_shape=inputs.shape[1:], classes=classes)
        load_weights(model, options.weights)
    else:
        model = trained(options.teacher, inputs, labels, options.epochs)
    strong = predict(model, eval_inputs, eval_labels)
    print(f"{options.eval_data}: teacher {strong.agreement:.1%}", flush=True)
    weak = weak_teachers(
        options.weak,
        options.teacher,
        options.weak_samples,
        inputs,
        labels,
        eval_inputs,
        eval_labels,
    )
    print(f"weak teachers: {', '.join(f'{one.agreement:.1%}' for one in weak)}", flush=True)
    rows, missed = campaign(strong, weak, classes, options.trials)
    print(tabulate(rows, headers=["kind", "trials", "warned of"]))
    raise SystemExit(1 if missed else 0)


def campaign(
    strong: Predictions, weak: list[Predictions], classes: int, trials: int
) -> tuple[list[tuple[str, int, int]], int]:
    """Rows of a table, and in how many trials the verdict was wrong.

    Args:
        strong: the predictions of a teacher on labelled data.
        weak: those of ten weak teachers.
    """
    names = [str(number) for number in range(classes)]
    rows, missed = [], 0
    for kind, by_row in (("permuted", False), ("shifted", False), ("shuffled", True)):
        seeds = range(trials)
        warned = [
            bool(judge("t", wrong(kind, strong, classes, s), names, by_row=by_row)) for s in seeds
        ]
        rows.append((kind, trials, sum(warned)))
        missed += trials - sum(warned)
    right = {
        "right": [part(strong, seed) for seed in range(max(0, trials - 20))],
        "right, weak teacher": [part(one, seed) for seed, one in enumerate(weak)],
        "right, label noise": [noisy(part(strong, seed), classes, seed) for seed in range(10)],
    }
    for kind, several in right.items():
        # a matrix is judged more strictly than a model
        count = sum(any(judge("t", one, names, by_row=r) for r in (False, True)) for one in several)
        rows.append((kind, len(several), count))
        missed += count
    return rows, missed


def part(predictions: Predictions, seed: int) -> Predictions:
    """A random part of the rows."""
    random = np.random.default_rng(seed)
    total = len(predictions.labels)
    mask = np.zeros(total, np.bool_)
    mask[random.permutation(total)[: random.integers(min(FEWEST, total), total + 1)]] = True
    return predictions.only(mask)


def wrong(kind: str, predictions: Predictions, classes: int, seed: int) -> Predictions:
    """A random part of the rows with something wrong about it."""
    random, some = np.random.default_rng(seed), part(predictions, seed)
    labels, guesses, confidence = some.labels, some.classes, some.confidence
    if kind == "permuted":
        order = np.arange(classes)
        while (order == np.arange(classes)).all():
            order = random.permutation(classes)
        guesses = order[guesses]
    elif kind == "shifted":
        labels = (labels + random.choice([-1, 1])) % classes
    else:
        rows = random.permutation(len(labels))
        guesses, confidence = guesses[rows], confidence[rows]
    return Predictions(labels, guesses, confidence)


def noisy(predictions: Predictions, classes: int, seed: int) -> Predictions:
    """The same with a fifth to two fifths of the labels random."""
    random = np.random.default_rng(seed)
    labels = predictions.labels.copy()
    replaced = random.random(len(labels)) < random.uniform(0.2, 0.4)
    labels[replaced] = random.integers(0, classes, int(replaced.sum()))
    return Predictions(labels, predictions.classes, predictions.confidence)


def load(spec: str, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """At most this many random samples, float in [0, 1], and their labels."""
    source = open_source(spec)
    rows = np.random.default_rng(0).permutation(len(source))[:samples].tolist()
    batches = [rows[b.start : b.stop] for b in sequential_batches(len(rows), 1000)]
    loaded = list(loader(source, batches))
    inputs = torch.cat([to_float(batch.inputs) for batch in loaded])
    return inputs, torch.cat([batch.labels for batch in loaded])


def trained(spec: str, inputs: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Module:
    """A model trained on all these samples."""
    model = build(spec, input_shape=inputs.shape[1:], classes=int(labels.max()) + 1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(inputs)), 64):
            if len(rows) > 1:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model


def predict(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Predictions:
    """What a model predicts for samples."""
    with torch.inference_mode():
        probs = torch.cat([model.eval()(some).softmax(-1) for some in torch.split(inputs, 500)])
    top = probs.max(-1)
    return Predictions(labels.numpy(), top.indices.numpy(), top.values.double().numpy())


def weak_teachers(
    count: int,
    spec: str,
    sizes: Sequence[int],
    inputs: torch.Tensor,
    labels: torch.Tensor,
    eval_inputs: torch.Tensor,
    eval_labels: torch.Tensor,
) -> list[Predictions]:
    """The predictions of some teachers of few samples, which are sure of themselves and often wrong."""

    def attempts() -> Iterator[Predictions]:
        for seed in range(10 * count):
            torch.manual_seed(seed)
            size = sizes[seed % len(sizes)]
            rows = torch.randperm(len(inputs))[:size]
            model = trained(spec, inputs[rows], labels[rows], max(3, 3000 // size))
            yield predict(model, eval_inputs[:2000], eval_labels[:2000])

    found: list[Predictions] = []
    for predictions in attempts():
        if WEAK[0] <= predictions.agreement <= WEAK[1]:
            found.append(predictions)
            if len(found) == count:
                break
    return found


if __name__ == "__main__":
    main()

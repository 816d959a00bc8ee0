"""How close a student of tokens, words, frames or pixels is to its teacher, on rows of the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from softcache.cache import Sampled
from softcache.data.loader import fetch_batch
from softcache.divergences import kl
from softcache.join.joined_data import JoinedData
from softcache.models.evaluate_rows import RowModel
from softcache.targets.decode import to_dense
from softcache.types import RowIndex, SparseTargets, StoredTargets

ROWS = 4096  # of the cache's first view, on which a student is compared
VALUES = 1 << 26  # log-probabilities of them, where a row has very many


def teacher_figures(
    model: RowModel, part: JoinedData, temperature: float, device: torch.device
) -> dict[str, float]:
    """Compare a model with the soft targets of samples that are spread evenly over the data.

    Args:
        model: in eval mode; returns log-probabilities at T = 1.
        part: the cache, with its samples; it fetches soft targets at `temperature`.

    Returns:
        The fields teacher_kl, teacher_agreement and acceptance of RowScores, by name. Empty without any rows,
        and for encodings of draws: of a single draw, all of these are far from what they are of the teacher.
    """
    if part.cache is not None and isinstance(part.cache.header.encoding, Sampled):
        return {}
    rows_wanted = max(1, min(ROWS, VALUES // part.classes))
    counts = part.row_counts()
    filled = np.flatnonzero(counts)  # a document may have no token that counts
    if not len(filled):
        return {}
    number = max(1, int(len(filled) * rows_wanted / max(1, counts.sum())))
    samples = np.unique(filled[np.linspace(0, len(filled) - 1, number).astype(np.int64)])
    sums, seen = torch.zeros(3, dtype=torch.float64), 0
    with torch.inference_mode():
        for sample in samples:
            if seen >= rows_wanted:
                break
            raw = fetch_batch(part.source, part.request(np.array([sample]), 0), part.augmentation)
            batch = part.training_batch(raw, 0, device)
            rows, targets = batch.rows, batch.targets[temperature]
            if rows is None or not isinstance(targets, StoredTargets) or not targets.count:
                continue
            few = slice(0, rows_wanted - seen)
            index, stored = RowIndex(*(tensor[few] for tensor in rows)), targets.rows(few)
            start = 0
            for log_q in model(batch.inputs, index):
                chosen = stored.rows(slice(start, start + len(log_q))).decoded()
                sums += _compared(torch.log_softmax(log_q / temperature, -1), chosen)
                start += len(log_q)
            seen += stored.count
    if not seen:
        return {}
    means = (sums / seen).tolist()
    return dict(zip(("teacher_kl", "teacher_agreement", "acceptance"), means, strict=True))


def _compared(log_q: Tensor, targets: Tensor | SparseTargets) -> Tensor:
    """Sums over rows: KL(teacher ‖ model), equal top classes, and the mass that both share, (3,) float64."""
    log_p = to_dense(targets)
    sums = (
        kl(log_q, targets).sum(),
        (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
        torch.minimum(log_p, log_q).exp().sum(),
    )
    return torch.stack([value.double().cpu() for value in sums])

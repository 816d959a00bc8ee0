"""Fit the directions of `basis` to a language model from its hidden states and the matrix of its head.

Logits are W h + b, so all that rows can differ in lies in the columns of W. From hidden states, of which many
fit into memory, the principal directions of the centred logits follow without a single row of logits: with
W_c, the matrix W centred over the classes, and S the covariance of the states, they are those of W_c S W_c^T.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from softcache.cache import Header
from softcache.data.loader import loader
from softcache.data.rows import layout_of_source
from softcache.data.source import Source
from softcache.dump.fidelity import SAMPLES, SAMPLES_AT_ONCE
from softcache.dump.fit_basis import NEGLIGIBLE, Directions
from softcache.models.language import TokenModel
from softcache.teachers.ensemble import Ensemble
from softcache.types import RowIndex
from softcache.util.progress import progress
from softcache.util.tensors import to_float

ROWS = 1 << 15  # of hidden states that are kept, at most


def head_directions(
    draft: Header, source: Source, teacher: Ensemble, max_directions: int
) -> Directions | None:
    """The principal directions of a teacher's log-probabilities at the temperature of the dump.

    Returns:
        Directions as principal_directions() returns them; None if the teacher is no single language model
        with a linear head.
    """
    model = teacher.teachers[0].model
    layout = layout_of_source(source)
    if layout is None or len(teacher.teachers) > 1 or not isinstance(model, TokenModel):
        return None
    random = np.random.default_rng(draft.seed)
    with_rows = np.flatnonzero(layout.counts(np.arange(layout.samples)) > 0)
    drawn = np.sort(random.choice(with_rows, min(SAMPLES, len(with_rows)), replace=False))
    parts = np.split(drawn, range(SAMPLES_AT_ONCE, len(drawn), SAMPLES_AT_ONCE))
    states: list[Tensor] = []
    with progress("fit", len(drawn), "samples") as advance:
        for batch in loader(source, [part.tolist() for part in parts]):
            inputs = to_float(batch.inputs)
            rows = RowIndex(batch.row_samples, batch.row_positions)
            if not states and not model.splits(inputs.to(teacher.device)):
                return None
            states.append(teacher.teachers[0].states(inputs, rows).float())
            advance(len(batch.inputs))
    every = torch.cat(states)[:ROWS]
    linear = model.linear_head(every)
    if linear is None:
        return None
    weight, bias = linear
    return directions_of(every, weight, bias, draft.temperature, max_directions)


def directions_of(
    states: Tensor, weight: Tensor, bias: Tensor, temperature: float, max_directions: int
) -> Directions:
    """The principal directions of (W h + b) / T, each row centred on its own mean.

    Args:
        states: (n, H) hidden states.
        weight: (C, H).
        bias: (C,).

    Returns:
        At most `max_directions` of them, fewer if the rows span fewer.
    """
    centred = weight - weight.mean(0)  # (C, H)
    offset = bias - bias.mean()
    mean = states.double().mean(0)
    deviations = states.double() - mean
    covariance = deviations.T @ deviations / len(states)  # (H, H)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()  # (H, H), whose square is the covariance
    gram = (centred.T @ centred).double()
    sizes, inner = torch.linalg.eigh(root.T @ gram @ root)
    sizes, inner = sizes.flip(0).clamp(min=0).sqrt(), inner.flip(1)  # strongest first
    strong = max(1, int((sizes > NEGLIGIBLE * sizes[0]).sum()))
    keep = min(max_directions, strong)
    mixed = (root @ inner[:, :keep] / sizes[:keep].clamp(min=1e-30)).float()  # (H, keep)
    directions = (centred @ mixed).T  # (keep, C), orthonormal
    middle = centred @ mean.float() + offset
    return Directions(middle / temperature, directions, sizes[:keep].float() / temperature)

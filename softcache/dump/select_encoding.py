"""Choose an encoding by its size and its KL divergence, measured on rows of the teacher itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.cache import (
    Basis,
    Bernoulli,
    Cache,
    Dense,
    Encoding,
    Header,
    Packed,
    Quantized,
    Sampled,
    TopK,
    parse_encoding,
)
from softcache.cache.allocate import Stored
from softcache.cache.encodings import TAIL_TEMPERATURES, row_bytes
from softcache.data.augment import Augmentation
from softcache.data.rows import layout_of_source
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import (
    VALUES,
    VALUES_OF_ROWS,
    divergence,
    draw_rows,
    draw_rows_of_samples,
    retemper,
    teacher_rows,
    temperatures_of,
)
from softcache.dump.fit_basis import Directions, principal_directions, shared_arrays, splits
from softcache.dump.fit_head import head_directions
from softcache.errors import SettingsError
from softcache.targets.decode import class_ids, decode
from softcache.targets.encode import make_encoder
from softcache.teachers.ensemble import Ensemble
from softcache.util.log import inform

AUTO = "auto"
ROWS = 4096  # drawn from the whole data set: three quarters to fit, the rest to measure
HELD_OUT = 1024
FIT_VIEWS = 8  # the rows come from the first views, however many views the file will hold

# what `auto` tries: topk:K, and basis:BYTES,K for each size and number of corrected classes
AUTO_TOPK = (8, 16, 32, 64, 128, 256)
AUTO_COEFFICIENT_BYTES = (8, 16, 32, 48, 64, 96, 128)
AUTO_TOP = (4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """An encoding that was measured."""

    spec: str
    encoding: Encoding
    shared: dict[str, Tensor]  # the arrays that its rows would share, by name
    bytes_per_row: int
    kl: dict[float, float]  # mean KL in nats, by temperature

    def to_json(self) -> dict[str, Any]:
        """The candidate as the header records it."""
        kl = {f"{temperature:g}": value for temperature, value in self.kl.items()}
        return {"encoding": self.spec, "bytes_per_row": self.bytes_per_row, "kl": kl}


def needs_rows(spec: str) -> bool:
    """Whether the encoding is fitted to rows of the teacher, or chosen by measuring them."""
    return spec == AUTO or spec.startswith("basis:")


def check_spec(spec: str, temperature: float, classes: int) -> None:
    """Raise SettingsError up front, not after hours, if `spec` is not an encoding for `classes`."""
    if spec == AUTO:
        return
    encoding = Basis(*_sizes(spec)[:1], 0, _sizes(spec)[1]) if needs_rows(spec) else None
    (encoding or parse_encoding(spec, temperature)).arrays(classes)


def draw_teacher_rows(
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
    workers: int,
    max_rows: int = ROWS,
) -> Tensor:
    """Run the teacher on rows drawn from the whole data set with the seed of the cache.

    The draw does not depend on which views and samples the file will hold, so every shard, and
    every view added later, gets the same encoding.

    Returns:
        (n, C) float32 log-probabilities at the temperature of the dump.
    """
    count = max(2, min(max_rows, VALUES // draft.classes))
    views = FIT_VIEWS if draft.augment else 1
    layout = layout_of_source(source)
    if layout is None:
        pairs = draw_rows(views, draft.data_samples, count, draft.seed)
    else:
        count = max(2, min(count, VALUES_OF_ROWS // draft.classes))
        every = range(draft.data_samples)
        pairs = draw_rows_of_samples(layout, views, every, count, draft.seed)
    return teacher_rows(
        teacher,
        source,
        pairs,
        temperature=draft.temperature,
        augmentation=augmentation,
        workers=workers,
    )


def select(
    spec: str,
    log_probs: Tensor | None,
    *,
    temperature: float,
    seed: int,
    max_kl: float,
    directions: Directions | None = None,
) -> tuple[Encoding, dict[str, Tensor], list[Candidate]]:
    """Turn an encoding specification into an encoding, fitting or choosing one if needed.

    Args:
        log_probs: (n, C) rows of the teacher at `temperature`; None if needs_rows() is false.
        max_kl: the largest mean KL in nats that `auto` accepts at any temperature.
        directions: of `basis`, if they are known without these rows.

    Returns:
        The encoding, the tensors that its rows share, and the candidates it was chosen from.

    Raises:
        SettingsError: the specification is unknown, or no candidate of `auto` meets `max_kl`.
    """
    if log_probs is None or not needs_rows(spec):
        return parse_encoding(spec, temperature), {}, []
    if spec != AUTO:
        fitted = fit_basis(spec, log_probs, temperature, seed, directions)
        return fitted.encoding, fitted.shared, [fitted]
    measured = candidates(log_probs, temperature=temperature, seed=seed, directions=directions)
    accepted = [c for c in measured if all(kl <= max_kl for kl in c.kl.values())]
    if not accepted:
        raise SettingsError(
            f"no encoding keeps KL within {max_kl:g} at T = "
            f"{', '.join(f'{t:g}' for t in temperatures_of(temperature, False))}; the best has "
            f"{min(max(c.kl.values()) for c in measured):.1e}: allow more with --max-kl"
        )
    best = min(accepted, key=lambda c: (c.bytes_per_row, max(c.kl.values())))
    return best.encoding, best.shared, measured


def candidates(
    log_probs: Tensor, *, temperature: float, seed: int, directions: Directions | None = None
) -> list[Candidate]:
    """Every encoding worth trying, measured on held-out rows and sorted by size.

    Args:
        log_probs: (n, C) rows of the teacher at `temperature`.
    """
    classes = log_probs.shape[-1]
    fit_rows, held_out = _split(log_probs)
    simple: list[Encoding] = [Dense(), Quantized()]
    tails = tuple(sorted({*TAIL_TEMPERATURES, temperature}))
    simple += [TopK(k, tails) for k in AUTO_TOPK if k <= classes // 2]
    measured = [_measured(spec_of(e), e, {}, held_out, temperature, seed) for e in simple]
    budgets = [size for size in AUTO_COEFFICIENT_BYTES if 2 * size < classes]
    if budgets:
        fitted = directions or principal_directions(fit_rows, max_directions=2 * max(budgets))
        for size in budgets:
            split = _best_split(size, 8, fitted, held_out, temperature, seed).encoding
            for top in AUTO_TOP:
                if isinstance(split, Basis) and top <= classes // 2:
                    encoding = dataclasses.replace(split, top=top)
                    shared = shared_arrays(encoding, fitted)
                    spec = f"basis:{size},{top}"
                    measured.append(_measured(spec, encoding, shared, held_out, temperature, seed))
    # with a teacher of few dimensions, larger budgets stay unspent and yield the same encoding
    unique = {candidate.encoding: candidate for candidate in reversed(measured)}
    return sorted(unique.values(), key=lambda c: c.bytes_per_row)


def fit_basis(
    spec: str,
    log_probs: Tensor,
    temperature: float,
    seed: int,
    directions: Directions | None = None,
) -> Candidate:
    """Fit the best `basis` encoding for the sizes in `spec`.

    Args:
        spec: basis:BYTES,K, the bytes of coefficients and the corrected classes of a row.
        log_probs: (n, C) rows of the teacher at `temperature`.

    Raises:
        SettingsError: the specification is not basis:BYTES,K.
    """
    size, top = _sizes(spec)
    fit_rows, held_out = _split(log_probs)
    fitted = directions or principal_directions(fit_rows, max_directions=2 * size)
    return _best_split(size, top, fitted, held_out, temperature, seed)


def most_directions(spec: str) -> int:
    """How many directions an encoding of `spec` can use at most."""
    return 2 * (max(AUTO_COEFFICIENT_BYTES) if spec == AUTO else _sizes(spec)[0])


def _sizes(spec: str) -> tuple[int, int]:
    sizes = spec.partition(":")[2].split(",")
    if len(sizes) != 2 or not all(re.fullmatch(r"[1-9]\d{0,8}", size, re.ASCII) for size in sizes):
        raise SettingsError(
            f"encoding {spec!r}: expected basis:BYTES,K, the bytes of coefficients and the corrected "
            "classes of a row, as in basis:64,8"
        )
    return int(sizes[0]), int(sizes[1])


def _best_split(
    size: int, top: int, fitted: Directions, held_out: Tensor, temperature: float, seed: int
) -> Candidate:
    measured = (
        _measured(f"basis:{size},{top}", e, shared_arrays(e, fitted), held_out, temperature, seed)
        for e in splits(size, top, len(fitted.directions))
    )
    return min(measured, key=lambda c: (max(c.kl.values()), c.bytes_per_row))


def measure(
    spec: str,
    encoding: Encoding,
    shared: dict[str, Tensor],
    log_probs: Tensor,
    temperature: float,
    seed: int,
) -> Candidate:
    """Measure an encoding on the held-out part of the rows `log_probs` (n, C)."""
    return _measured(spec, encoding, shared, _split(log_probs)[1], temperature, seed)


def spec_of(encoding: Encoding) -> str:
    """The specification of an encoding, as written on the command line."""
    match encoding:
        case TopK():
            return f"topk:{encoding.k}"
        case Packed():
            return f"packed:{encoding.n}"
        case Sampled():
            return f"sampled:{encoding.n}"
        case Basis():
            return f"basis:{encoding.wide + encoding.narrow // 2},{encoding.top}"
    return encoding.name


def _split(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows to measure; every fourth one, so that both span the whole data set."""
    if len(log_probs) < 2:
        return log_probs, log_probs
    indices = torch.arange(len(log_probs), device=log_probs.device)
    return log_probs[indices % 4 != 0], log_probs[indices % 4 == 0][:HELD_OUT]


def _measured(
    spec: str,
    encoding: Encoding,
    shared: dict[str, Tensor],
    held_out: Tensor,
    temperature: float,
    seed: int,
) -> Candidate:
    classes = held_out.shape[-1]
    device = held_out.device
    size = row_bytes(encoding, classes)
    encode = make_encoder(encoding, shared, temperature=temperature, seed=seed, device=device)
    stored = encode(held_out, 0, np.arange(len(held_out)))
    if "ids" in stored:
        stored["ids"] = class_ids(stored["ids"], classes)
    floats = {name: tensor.to(device).float() for name, tensor in shared.items()}
    kl = {}
    for target_temperature in temperatures_of(temperature, isinstance(encoding, Sampled)):
        targets = decode(
            encoding,
            stored | floats,
            temperature=temperature,
            wanted=target_temperature,
            classes=classes,
        )
        multi_label = isinstance(encoding, Bernoulli)
        exact = retemper(held_out, temperature, target_temperature, multi_label=multi_label)
        kl[target_temperature] = float(divergence(exact, targets, multi_label=multi_label).mean())
    return Candidate(spec, encoding, shared, size, kl)


def candidates_table(measured: Sequence[Candidate], chosen: Encoding) -> str:
    """A table of candidates with their KL at each temperature; a star marks the chosen one."""
    temperatures = sorted({t for candidate in measured for t in candidate.kl})

    def lines() -> Iterator[list[str]]:
        for candidate in measured:
            mark = "*" if candidate.encoding == chosen else ""
            kl = [f"{candidate.kl[t]:.1e}" if t in candidate.kl else "-" for t in temperatures]
            yield [mark + candidate.spec, f"{candidate.bytes_per_row:,}", *kl]

    names = [f"KL at T={t:g}" for t in temperatures]
    return tabulate(
        list(lines()),
        headers=["encoding", "bytes per row", *names],
        colalign=("left", *["right"] * (len(names) + 1)),
        disable_numparse=True,
    )


def encoding_for_dump(
    config: DumpConfig,
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
) -> tuple[Header, Stored]:
    """Choose the encoding of a dump from its settings.

    Returns:
        The header with the encoding and how it was chosen, and the arrays that all rows share.
    """
    rows, directions = None, None
    if needs_rows(config.encoding_spec):
        rows = draw_teacher_rows(draft, source, teacher, augmentation, config.workers)
        directions = head_directions(draft, source, teacher, most_directions(config.encoding_spec))
    encoding, shared, candidates = select(
        config.encoding_spec,
        rows,
        temperature=draft.temperature,
        seed=draft.seed,
        max_kl=config.max_kl,
        directions=directions,
    )
    if candidates:
        inform(candidates_table(candidates, encoding))
    choice = (draft.choice or {}) | {"candidates": [c.to_json() for c in candidates]}
    arrays = {name: tensor.numpy() for name, tensor in shared.items()}
    return replace(draft, encoding=encoding, choice=choice), arrays


def encoding_of(draft: Header, like: Cache) -> tuple[Header, Stored]:
    """Take over the encoding of another cache.

    Returns:
        The header with that encoding, and the arrays that all rows share.

    Raises:
        SettingsError: the other cache has a different number of classes or temperature.
    """
    for name in ("classes", "temperature", "multi_label"):
        expected, actual = getattr(draft, name), getattr(like.header, name)
        if actual != expected:
            raise SettingsError(f"--like {like.path} has {name} {actual}; this dump has {expected}")
    shared = [array.name for array in like.header.arrays if array.axis == "shared"]
    arrays = {name: np.array(like.arrays[name]) for name in shared}
    return replace(draft, encoding=like.header.encoding, choice=like.header.choice), arrays

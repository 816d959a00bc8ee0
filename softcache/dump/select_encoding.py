"""Choose an encoding by what it costs and what it keeps, measured on rows of the teacher's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from softcache.cache import (
    Basis,
    Cache,
    Dense,
    Encoding,
    Header,
    Quantized,
    Sampled,
    TopK,
    parse_encoding,
)
from softcache.cache.allocate import Stored
from softcache.cache.encodings import TAIL_TEMPERATURES
from softcache.data.augment import Augmentation
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import (
    VALUES,
    divergence,
    draw_rows,
    retemper,
    teacher_rows,
    temperatures_of,
)
from softcache.dump.fit_basis import Directions, principal_directions, shared_arrays, splits
from softcache.errors import SettingsError
from softcache.targets.decode import class_ids, decode
from softcache.targets.encode import make_encoder
from softcache.teachers.ensemble import Ensemble
from softcache.util.log import inform

AUTO = "auto"

ROWS = 4096  # drawn from the whole data set: three quarters to fit, the rest to measure

HELD_OUT = 1024

FIT_VIEWS = 8  # the rows come from the first views, however many the file is to hold

AUTO_TOPK = (8, 16, 32, 64, 128, 256)

AUTO_COEFFICIENT_BYTES = (8, 16, 32, 48, 64, 96, 128)

AUTO_TOP = (4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """An encoding, what its rows would share, its bytes a row, and its mean KL by temperature."""

    spec: str
    encoding: Encoding
    shared: dict[str, Tensor]
    bytes_per_row: int
    kl: dict[float, float]

    def to_json(self) -> dict[str, Any]:
        kl = {f"{temperature:g}": value for temperature, value in self.kl.items()}
        return {"encoding": self.spec, "bytes_per_row": self.bytes_per_row, "kl": kl}


def needs_rows(spec: str) -> bool:
    """Whether an encoding is fitted to, or chosen by, rows of the teacher."""
    return spec == AUTO or spec.startswith("basis:")


def check_spec(spec: str, temperature: float, classes: int) -> None:
    """Raise SettingsError now rather than after hours, if `spec` names no encoding for `classes`."""
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
    most: int = ROWS,
) -> Tensor:
    """Rows of the teacher (n, C), drawn from the whole data with the cache's seed.

    They do not depend on the views and samples that the file is to hold, so that every shard, and
    every view that is added later, comes to the same encoding.
    """
    count = max(2, min(most, VALUES // draft.classes))
    views = FIT_VIEWS if draft.augment else 1
    return teacher_rows(
        teacher,
        source,
        draw_rows(views, draft.data_samples, count, draft.seed),
        temperature=draft.temperature,
        augmentation=augmentation,
        workers=workers,
    )


def select(
    spec: str, log_probs: Tensor | None, *, temperature: float, seed: int, max_kl: float
) -> tuple[Encoding, dict[str, Tensor], list[Candidate]]:
    """The encoding that `spec` comes to, what its rows share, and the candidates it was among.

    Args:
        log_probs: (n, C) rows of the teacher at `temperature`; None where needs_rows() is false.

    Raises:
        SettingsError: the specification is unknown, or no candidate of `auto` meets `max_kl`.
    """
    if log_probs is None or not needs_rows(spec):
        return parse_encoding(spec, temperature), {}, []
    if spec != AUTO:
        found = fit_basis(spec, log_probs, temperature, seed)
        return found.encoding, found.shared, [found]
    found_all = candidates(log_probs, temperature=temperature, seed=seed)
    good = [c for c in found_all if all(kl <= max_kl for kl in c.kl.values())]
    if not good:
        raise SettingsError(
            f"no encoding keeps KL within {max_kl:g} at T = "
            f"{', '.join(f'{t:g}' for t in temperatures_of(temperature, False))}; the best has "
            f"{min(max(c.kl.values()) for c in found_all):.1e}: allow more with --max-kl"
        )
    best = min(good, key=lambda c: (c.bytes_per_row, max(c.kl.values())))
    return best.encoding, best.shared, found_all


def candidates(log_probs: Tensor, *, temperature: float, seed: int) -> list[Candidate]:
    """Every encoding worth trying for so many classes, measured on held-out rows."""
    classes = log_probs.shape[-1]
    fit, held = _split(log_probs)
    simple: list[Encoding] = [Dense(), Quantized()]
    tails = tuple(sorted({*TAIL_TEMPERATURES, temperature}))
    simple += [TopK(k, tails) for k in AUTO_TOPK if k <= classes // 2]
    found = [_measured(spec_of(e), e, {}, held, temperature, seed) for e in simple]
    budgets = [size for size in AUTO_COEFFICIENT_BYTES if 2 * size < classes]
    if budgets:
        fitted = principal_directions(fit, most=2 * max(budgets))
        for size in budgets:
            split = _best_split(size, 8, fitted, held, temperature, seed).encoding
            for top in AUTO_TOP:
                if isinstance(split, Basis) and top <= classes // 2:
                    encoding = dataclasses.replace(split, top=top)
                    shared = shared_arrays(encoding, fitted)
                    spec = f"basis:{size},{top}"
                    found.append(_measured(spec, encoding, shared, held, temperature, seed))
    # a teacher of few dimensions leaves large budgets unspent, which makes twins
    unique = {candidate.encoding: candidate for candidate in reversed(found)}
    return sorted(unique.values(), key=lambda c: c.bytes_per_row)


def fit_basis(spec: str, log_probs: Tensor, temperature: float, seed: int) -> Candidate:
    """The best `basis` of so many bytes of coefficients, and so many exact entries.

    Raises:
        SettingsError: the specification is not basis:BYTES,K.
    """
    size, top = _sizes(spec)
    fit, held = _split(log_probs)
    fitted = principal_directions(fit, most=2 * size)
    return _best_split(size, top, fitted, held, temperature, seed)


def _sizes(spec: str) -> tuple[int, int]:
    sizes = spec.partition(":")[2].split(",")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise SettingsError(
            f"encoding {spec!r}: expected basis:BYTES,K, bytes of coefficients and exact entries "
            "of a row, as in basis:64,8"
        )
    return int(sizes[0]), int(sizes[1])


def _best_split(
    size: int, top: int, fitted: Directions, held: Tensor, temperature: float, seed: int
) -> Candidate:
    tried = (
        _measured(f"basis:{size},{top}", e, shared_arrays(e, fitted), held, temperature, seed)
        for e in splits(size, top, len(fitted.directions))
    )
    return min(tried, key=lambda c: (max(c.kl.values()), c.bytes_per_row))


def measure(
    spec: str,
    encoding: Encoding,
    shared: dict[str, Tensor],
    log_probs: Tensor,
    temperature: float,
    seed: int,
) -> Candidate:
    """An encoding measured on the held-out ones of rows (n, C)."""
    return _measured(spec, encoding, shared, _split(log_probs)[1], temperature, seed)


def spec_of(encoding: Encoding) -> str:
    """The encoding as the command line names it."""
    match encoding:
        case TopK():
            return f"topk:{encoding.k}"
        case Sampled():
            return f"sampled:{encoding.n}"
        case Basis():
            return f"basis:{encoding.wide + encoding.narrow // 2},{encoding.top}"
    return encoding.name


def _split(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to fit, and rows to measure; they come by sample, so both take from everywhere."""
    if len(log_probs) < 2:
        return log_probs, log_probs
    at = torch.arange(len(log_probs), device=log_probs.device)
    return log_probs[at % 4 != 0], log_probs[at % 4 == 0][:HELD_OUT]


def _measured(
    spec: str,
    encoding: Encoding,
    shared: dict[str, Tensor],
    held: Tensor,
    temperature: float,
    seed: int,
) -> Candidate:
    classes = held.shape[-1]
    device = held.device
    arrays = [array for array in encoding.arrays(classes) if array.axis == "rows"]
    size = sum(np.dtype(a.dtype).itemsize * int(np.prod(a.shape)) for a in arrays)
    encode = make_encoder(encoding, shared, temperature=temperature, seed=seed, device=device)
    stored = encode(held, 0, np.arange(len(held)))
    if "ids" in stored:
        stored["ids"] = class_ids(stored["ids"], classes)
    floats = {name: tensor.to(device).float() for name, tensor in shared.items()}
    kl = {}
    for wanted in temperatures_of(temperature, isinstance(encoding, Sampled)):
        targets = decode(
            encoding, stored | floats, temperature=temperature, wanted=wanted, classes=classes
        )
        kl[wanted] = float(divergence(retemper(held, temperature, wanted), targets).mean())
    return Candidate(spec, encoding, shared, size, kl)


def candidates_table(found: Sequence[Candidate], chosen: Encoding) -> str:
    """Candidates by size, with KL at each temperature; the chosen one is marked."""

    temperatures = sorted({t for candidate in found for t in candidate.kl})

    def lines() -> Iterator[list[str]]:
        for candidate in found:
            mark = "*" if candidate.encoding == chosen else ""
            kl = [f"{candidate.kl[t]:.1e}" if t in candidate.kl else "-" for t in temperatures]
            yield [mark + candidate.spec, f"{candidate.bytes_per_row:,}", *kl]

    names = [f"KL at T={t:g}" for t in temperatures]
    return tabulate(
        list(lines()),
        headers=["encoding", "bytes a row", *names],
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
    """The header with the encoding that was asked for, fitted or measured, and its arrays."""
    rows = None
    if needs_rows(config.encoding):
        rows = draw_teacher_rows(draft, source, teacher, augmentation, config.workers)
    encoding, shared, candidates = select(
        config.encoding,
        rows,
        temperature=draft.temperature,
        seed=draft.seed,
        max_kl=config.max_kl,
    )
    if candidates:
        inform(candidates_table(candidates, encoding))
    choice = (draft.choice or {}) | {"candidates": [c.to_json() for c in candidates]}
    arrays = {name: tensor.numpy() for name, tensor in shared.items()}
    return replace(draft, encoding=encoding, choice=choice), arrays


def encoding_of(draft: Header, like: Cache) -> tuple[Header, Stored]:
    """The header with the encoding of another cache, and the arrays that it was fitted to.

    Raises:
        SettingsError: that cache is of other classes or of another temperature.
    """
    for name in ("classes", "temperature"):
        theirs, mine = getattr(like.header, name), getattr(draft, name)
        if theirs != mine:
            raise SettingsError(f"--like {like.path} has {name} {theirs}; this dump has {mine}")
    shared = [array.name for array in like.header.arrays if array.axis == "shared"]
    arrays = {name: np.array(like.arrays[name]) for name in shared}
    return replace(draft, encoding=like.header.encoding, choice=like.header.choice), arrays

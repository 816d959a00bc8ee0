"""Estimate what a dump would cost, before it is started."""

from __future__ import annotations

import math
import time

import numpy as np
from torch import Tensor

from softcache.cache import Encoding, Header, open_cache
from softcache.cache.encodings import row_bytes
from softcache.data.rows import has_tokens, layout_of_source, lengths_of
from softcache.data.source import Source
from softcache.dump.config import DumpConfig
from softcache.dump.fit_basis import Directions
from softcache.dump.fit_head import head_directions
from softcache.dump.prepare import draft_header, input_array_spec, prepare, size_advice
from softcache.dump.select_encoding import (
    AUTO,
    Candidate,
    candidates,
    candidates_table,
    draw_teacher_rows,
    encoding_of,
    measure,
    most_directions,
    needs_rows,
    select,
    spec_of,
)
from softcache.targets.fetch import shared_tensors

MOST_CLASSES = 1 << 15  # with more, only the requested encoding is tried: fitting takes minutes
WARM_UP_ROWS = 256
FIRST_TOKENS = 8


def dry_run(config: DumpConfig) -> str:
    """Report what a dump would cost, as text, without writing anything.

    The time is extrapolated from a few batches; the report compares the requested encoding with
    the candidates of `auto`.
    """
    source, augmentation, teacher = prepare(config)
    draft = draft_header(config, source, teacher)
    draw_teacher_rows(draft, source, teacher, augmentation, config.workers, max_rows=WARM_UP_ROWS)
    start = time.perf_counter()
    log_probs = draw_teacher_rows(draft, source, teacher, augmentation, config.workers)
    rate = len(log_probs) / (time.perf_counter() - start)
    directions = None
    if needs_rows(config.encoding_spec):
        directions = head_directions(draft, source, teacher, most_directions(config.encoding_spec))
    encoding, shared, table = encoding_to_try(config, draft, log_probs, directions)
    compared = not (config.multi_label or teacher.asks_server or draft.classes > MOST_CLASSES)
    if config.encoding_spec != AUTO and compared:
        others = candidates(log_probs, temperature=draft.temperature, seed=draft.seed)
        table += [other for other in others if other.encoding != encoding]
        table.sort(key=lambda candidate: candidate.bytes_per_row)
    rows = draft.row_count * draft.views
    shared_bytes = sum(tensor.numel() * tensor.element_size() for tensor in shared.values())
    each = row_bytes(encoding, draft.classes)
    size = rows * each + draft.samples * 16 + shared_bytes  # 16: a label and a key
    if draft.rows is not None:
        size += draft.row_count * 4 + draft.samples * 24  # a label each; offsets and runs
    if config.embed_inputs and draft.rows is not None:
        size += 4 * int(draft.rows.get("tokens", 0))
    elif config.embed_inputs:
        inputs = input_array_spec(source)
        size += draft.samples * np.dtype(inputs.dtype).itemsize * math.prod(inputs.shape)
    advice = size_advice(draft, each)
    shard, shards = config.shard
    part = f" (shard {shard} of {shards} of {draft.data_samples:,})" if shards > 1 else ""
    return (
        f"{candidates_table(table, encoding)}\n\n"
        f"{first_tokens(source, draft)}"
        f"{draft.samples:,} samples{part} x {draft.views:,} view(s) as {spec_of(encoding)}: "
        f"about {size:,} bytes; about {rows / rate:,.0f} s at {rate:,.0f} rows/s here. "
        f"Nothing was written.{f' Note: {advice}.' if advice else ''}"
    )


def first_tokens(source: Source, draft: Header) -> str:
    """What a language model reads first, and how many of its tokens count; empty for other data."""
    if not has_tokens(source):
        return ""
    ids = source.fetch([0])[0][0][:FIRST_TOKENS].tolist()
    tokens = int(lengths_of(source).sum())
    layout = layout_of_source(source)
    count = layout.rows if layout else 0
    return (
        f"the first tokens are {', '.join(map(str, ids))}; {count:,} of {tokens:,} tokens "
        f"({count / tokens:.1%}) have a row, in {len(source):,} samples\n\n"
    )


def encoding_to_try(
    config: DumpConfig, draft: Header, log_probs: Tensor, directions: Directions | None = None
) -> tuple[Encoding, dict[str, Tensor], list[Candidate]]:
    """The encoding that the dump would use, the tensors its rows share, and measured candidates.

    Args:
        log_probs: (n, C) float32, rows of the teacher at the temperature of the dump.
        directions: of `basis`, if they are known without these rows.
    """
    if config.like is not None:
        like = open_cache(config.like)
        encoding, shared = encoding_of(draft, like)[0].encoding, shared_tensors(like)
        table: list[Candidate] = []
    else:
        encoding, shared, table = select(
            config.encoding_spec,
            log_probs,
            temperature=draft.temperature,
            seed=draft.seed,
            max_kl=config.max_kl,
            directions=directions,
        )
    if not table:
        spec = spec_of(encoding)
        table = [measure(spec, encoding, shared, log_probs, draft.temperature, draft.seed)]
    return encoding, shared, table

"""What a dump would take, before it is begun."""

from __future__ import annotations

import math
import time

import numpy as np
from torch import Tensor

from softcache.cache import Encoding, Header, open_cache
from softcache.data.augment import parse_augment
from softcache.data.open import open_source
from softcache.dump import select_encoding
from softcache.dump.config import DumpConfig
from softcache.dump.prepare import draft_header, input_array_spec, load_teachers
from softcache.dump.select_encoding import encoding_of
from softcache.targets.fetch import shared_tensors

MOST_CLASSES = 1 << 15  # of more, only the encoding asked for is tried: fitting takes minutes


def dry_run(config: DumpConfig) -> str:
    """What a dump would take: bytes on disk, time by a few batches, candidates; writes nothing."""
    source = open_source(config.data)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    teacher = load_teachers(config, source, augmentation)
    draft = draft_header(config, source, teacher)
    select_encoding.draw_teacher_rows(
        draft, source, teacher, augmentation, config.workers, most=256
    )  # warms up
    before = time.perf_counter()
    again = select_encoding.draw_teacher_rows(draft, source, teacher, augmentation, config.workers)
    rate = len(again) / (time.perf_counter() - before)
    encoding, shared, found = encoding_to_try(config, draft, again)
    if config.encoding != select_encoding.AUTO and draft.classes <= MOST_CLASSES:
        others = select_encoding.candidates(again, temperature=draft.temperature, seed=draft.seed)
        found += [other for other in others if other.encoding != encoding]
        found.sort(key=lambda candidate: candidate.bytes_per_row)
    rows = draft.samples * draft.views
    common = sum(tensor.numel() * tensor.element_size() for tensor in shared.values())
    row_bytes = sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape)
        for array in encoding.arrays(draft.classes)
        if array.axis == "rows"
    )
    size = rows * row_bytes + draft.samples * 16 + common
    if config.embed_inputs:
        one = input_array_spec(source)
        size += draft.samples * np.dtype(one.dtype).itemsize * math.prod(one.shape)
    shard, shards = config.shard
    part = f" (shard {shard} of {shards} of {draft.data_samples:,})" if shards > 1 else ""
    return (
        f"{select_encoding.candidates_table(found, encoding)}\n\n"
        f"{draft.samples:,} samples{part} x {draft.views:,} view(s) as {select_encoding.spec_of(encoding)}: "
        f"about {size:,} bytes; about {rows / rate:,.0f} s at {rate:,.0f} rows/s here. "
        "Nothing was written."
    )


def encoding_to_try(
    config: DumpConfig, draft: Header, log_probs: Tensor
) -> tuple[Encoding, dict[str, Tensor], list[select_encoding.Candidate]]:
    """The encoding that the dump would take, what its rows share, and how it measures."""
    if config.like is not None:
        like = open_cache(config.like)
        encoding, shared = encoding_of(draft, like)[0].encoding, shared_tensors(like)
        found: list[select_encoding.Candidate] = []
    else:
        encoding, shared, found = select_encoding.select(
            config.encoding,
            log_probs,
            temperature=draft.temperature,
            seed=draft.seed,
            max_kl=config.max_kl,
        )
    if not found:
        spec = select_encoding.spec_of(encoding)
        found = [
            select_encoding.measure(
                spec, encoding, shared, log_probs, draft.temperature, draft.seed
            )
        ]
    return encoding, shared, found

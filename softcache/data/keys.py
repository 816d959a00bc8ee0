"""Content keys, by which a cache recognises its samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from softcache.data.rows import PADDING, has_tokens
from softcache.data.source import Source
from softcache.data.text import text_lengths

TOKEN_LAYOUT = "<u4 tokens"
TEXT_LAYOUT = "<u4 text"  # instead of dtype and shape: a text's key does not depend on its padding


def keys_of(inputs: Tensor, source: Source) -> npt.NDArray[np.uint64]:
    """The keys of raw inputs (B, *shape) of a source, (B,); padding is not part of a text or of tokens."""
    if has_tokens(source):
        return token_keys(inputs)
    return sample_keys(inputs, text=bool(getattr(source, "text", False)))


def token_keys(inputs: Tensor) -> npt.NDArray[np.uint64]:
    """The keys of token ids (B, length), padded with PADDING, (B,): hashes of the ids alone.

    They do not depend on how a tokenizer is called, so ids that were made elsewhere have them too.
    """
    rows = inputs.numpy()
    seed, digest = _seed(TOKEN_LAYOUT), xxhash.xxh3_64_intdigest
    lengths = (rows != PADDING).sum(1).tolist()
    keys = (
        digest(row[:length].astype("<u4").tobytes(), seed)
        for row, length in zip(rows, lengths, strict=True)
    )
    return np.fromiter(keys, np.uint64, len(rows))


def sample_keys(inputs: Tensor, *, text: bool = False) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each sample's own content: xxh3 over its bytes, seeded by dtype and shape.

    A text is hashed without its padding, so that its key is the same in a batch of any length.

    Args:
        inputs: (B, *shape), on the CPU.
        text: whether the samples are texts: code points (B, length), padded with zeros.

    Returns:
        (B,) uint64.
    """
    if text:
        return _text_keys(inputs)
    rows = inputs.contiguous().numpy()
    seed = _seed(f"{rows.dtype.newbyteorder('<').str}{rows.shape[1:]}")
    raw, size = rows.reshape(-1).view(np.uint8).data, rows[:1].nbytes
    digest = xxhash.xxh3_64_intdigest
    keys = (
        digest(raw[start : start + size], seed) for start in range(0, len(rows) * size, size or 1)
    )
    return np.fromiter(keys, np.uint64, len(rows)) if size else np.full(len(rows), seed, np.uint64)


def _text_keys(points: Tensor) -> npt.NDArray[np.uint64]:
    rows = np.ascontiguousarray(points.numpy(), "<u4")  # (B, length)
    seed, digest = _seed(TEXT_LAYOUT), xxhash.xxh3_64_intdigest
    keys = (
        digest(row[:length].tobytes(), seed)
        for row, length in zip(rows, text_lengths(rows).tolist(), strict=True)
    )
    return np.fromiter(keys, np.uint64, len(rows))


def _seed(layout: str) -> int:
    return xxhash.xxh3_64_intdigest(layout.encode())

"""The file format: what a cache is on disk. It needs numpy, h5py and xxhash, never torch."""

from softcache.cache.arrays import Array
from softcache.cache.draws import Sampled
from softcache.cache.encodings import (
    Basis,
    Bernoulli,
    Dense,
    Encoding,
    Quantized,
    TopK,
    parse_encoding,
)
from softcache.cache.header import Header
from softcache.cache.packed import Packed
from softcache.cache.reader import Cache, open_cache

__all__ = [
    "Array",
    "Basis",
    "Bernoulli",
    "Cache",
    "Dense",
    "Encoding",
    "Header",
    "Packed",
    "Quantized",
    "Sampled",
    "TopK",
    "open_cache",
    "parse_encoding",
]

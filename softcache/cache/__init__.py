"""The file: what a cache is on disk. numpy, h5py and xxhash; no torch, nothing above it."""

from softcache.cache.encodings import Dense, Encoding, parse_encoding
from softcache.cache.header import Array, Header
from softcache.cache.reader import Cache, open_cache

__all__ = ["Array", "Cache", "Dense", "Encoding", "Header", "open_cache", "parse_encoding"]

"""Samples joined to rows of a cache, and the fingerprints that tell whether a view is replayed."""

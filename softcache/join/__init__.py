"""Samples joined to cache rows, and fingerprints that check that views are replayed exactly."""

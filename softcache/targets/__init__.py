"""Encode, decode, fetch and re-temper soft targets, in torch."""

"""Samples: sources by kind, their keys, augmentation and loading."""

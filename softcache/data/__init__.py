"""Samples: data sources of every kind, content keys, augmentation and loading."""

"""Helpers that know nothing about distillation: files, callables, specs, progress, random numbers."""

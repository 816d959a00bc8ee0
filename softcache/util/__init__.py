"""What knows nothing of distillation: files, callables, specifications, progress, random numbers."""

"""Students and teachers built from a specification, with their preprocessing and evaluation."""

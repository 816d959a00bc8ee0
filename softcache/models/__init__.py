"""Students and teachers from a specification, their preprocessing and evaluation."""

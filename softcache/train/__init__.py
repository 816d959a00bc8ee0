"""Stage 2: a cache becomes students. The teacher is not here."""

"""Stage 1: run the teacher once over the samples and write its soft targets to a cache file."""

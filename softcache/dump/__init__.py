"""Stage 1: samples become a file. The teacher runs once."""

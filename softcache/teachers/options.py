"""Names of teacher outputs and precisions; importing them does not import torch."""

from __future__ import annotations

OUTPUTS = ("logits", "probabilities", "log_probabilities")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
COMPILED = ", compiled"  # suffix of the precision in a header

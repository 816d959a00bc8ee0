"""What can be asked of a teacher by name; importing this does not import torch."""

from __future__ import annotations

OUTPUTS = ("logits", "probabilities", "log_probabilities")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
COMPILED = ", compiled"  # after the precision in a header

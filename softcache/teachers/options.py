"""What a teacher may be asked for by name; no torch here."""

from __future__ import annotations

OUTPUTS = ("logits", "probabilities", "log_probabilities")

COMPILED = ", compiled"  # behind the precision in a header

"""Run the teacher once: its softened class probabilities in one file, any number of students.

cache = softcache.open("cache.h5")
data = softcache.SoftLabelDataset(dataset, cache)
loss = softcache.distillation_loss(logits, targets, labels, temperature=4.0, alpha=0.9).total
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from softcache._version import __version__
from softcache.errors import SoftcacheError

if TYPE_CHECKING:
    from softcache.api import SoftCache, SoftLabelDataset, open
    from softcache.losses import distillation_loss
    from softcache.targets.decode import to_dense
    from softcache.types import SparseTargets

__all__ = [
    "SoftCache",
    "SoftLabelDataset",
    "SoftcacheError",
    "SparseTargets",
    "__version__",
    "distillation_loss",
    "open",
    "to_dense",
]

# torch takes seconds to import: each name is looked up when it is first used
_PLACES = {
    "SoftCache": "softcache.api",
    "SoftLabelDataset": "softcache.api",
    "SparseTargets": "softcache.types",
    "distillation_loss": "softcache.losses",
    "open": "softcache.api",
    "to_dense": "softcache.targets.decode",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever it is
    if name not in _PLACES:
        raise AttributeError(f"module 'softcache' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)

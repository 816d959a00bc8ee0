"""Run the teacher once: its softened class probabilities in one file, any number of students.

cache = softcache.dump(teacher="models.py:resnet50", data="folder:images", out="cache.h5")
softcache.train("cache.h5", student="cnn:16,32,64", data="folder:images", out="runs/small")
cache = softcache.open("cache.h5")
data = softcache.SoftLabelDataset(dataset, cache)
loss = softcache.distillation_loss(logits, targets, labels, temperature=4.0, alpha=0.9).total
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from softcache._version import __version__
from softcache.errors import SoftcacheError

if TYPE_CHECKING:
    from softcache.api import SoftCache, SoftLabelDataset, ViewSampler, dump, open, train
    from softcache.losses import distillation_loss
    from softcache.models.build import build
    from softcache.targets.decode import to_dense
    from softcache.token_data import PackedTokens, collate_tokens
    from softcache.types import SparseTargets, StoredTargets

__all__ = [
    "PackedTokens",
    "SoftCache",
    "SoftLabelDataset",
    "SoftcacheError",
    "SparseTargets",
    "StoredTargets",
    "ViewSampler",
    "__version__",
    "build",
    "collate_tokens",
    "distillation_loss",
    "dump",
    "open",
    "to_dense",
    "train",
]

# torch takes seconds to import: the module of each name is imported when the name is first used
_MODULES = {
    "PackedTokens": "softcache.token_data",
    "collate_tokens": "softcache.token_data",
    "SoftCache": "softcache.api",
    "SoftLabelDataset": "softcache.api",
    "SparseTargets": "softcache.types",
    "StoredTargets": "softcache.types",
    "ViewSampler": "softcache.api",
    "build": "softcache.models.build",
    "distillation_loss": "softcache.losses",
    "dump": "softcache.api",
    "open": "softcache.api",
    "to_dense": "softcache.targets.decode",
    "train": "softcache.api",
}


class _Package(ModuleType):
    """This module, in which `dump` and `train` are functions though packages are called so too."""

    def __setattr__(self, name: str, value: object) -> None:
        # importing softcache.dump.config would put the package in the place of the function
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:  # noqa: ANN401  # whatever it is
    if name not in _MODULES:
        raise AttributeError(f"module 'softcache' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__

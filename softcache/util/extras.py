"""Libraries that come with an extra of softcache, imported late."""

from __future__ import annotations

import importlib.util
from typing import Any

from softcache.errors import SettingsError


def import_extra(module: str, *, extra: str, what: str) -> Any:  # noqa: ANN401  # a module
    """A module that comes with an extra of softcache.

    Raises:
        SettingsError: it is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"{what} needs {module} ({error}); pip install 'softcache[{extra}]'"
        ) from error

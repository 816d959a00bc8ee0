"""Optional dependencies, imported only when they are needed."""

from __future__ import annotations

import importlib.util
from typing import Any

from softcache.errors import SettingsError


def install_command(extra: str) -> str:
    """The command that installs an extra, for error messages."""
    return f"pip install 'softcache[{extra}]' (or, in a clone, pip install -e '.[{extra}]')"


def import_extra(module: str, *, extra: str, what: str) -> Any:  # noqa: ANN401  # a module
    """Import a module that is installed with one of softcache's extras.

    Args:
        module: the dotted name of the module.
        extra: the extra to install, as in `softcache[extra]`.
        what: the feature that needs the module, for the error message.

    Raises:
        SettingsError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(f"{what} needs {module} ({error}); {install_command(extra)}") from error

"""Resolve `FILE.py:CALLABLE` and `package.module:CALLABLE`."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from softcache.errors import MissingFileError, SettingsError


def import_callable(spec: str, *, what: str) -> Callable[..., Any]:
    """The callable that `spec` names; `what` says in messages what it was to be.

    Raises:
        SettingsError: no such file, module or attribute, it fails on import, or is not callable.
    """
    place, _, attribute = spec.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
        raise SettingsError(
            f"{what} {spec}: {place} fails on import with {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise SettingsError(
            f"{what} {spec}: {place} has no callable {attribute!r}; expected PLACE:CALLABLE"
        )
    return found  # type: ignore[no-any-return]  # callable() narrows Any no further


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}; expected FILE.py:CALLABLE")
    # registered under a name of its own, so that loader workers and pickle find its classes
    # of its whole path, since two files may be called models.py
    name = f"softcache_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise SettingsError(
                f"no module named {error.name!r}; install it, or run where Python finds it"
            ) from error
        raise


def call_user(make: Callable[..., Any], *, what: str, **arguments: object) -> Any:  # noqa: ANN401
    """Call a user's callable.

    Raises:
        SettingsError: it raises, or wants other arguments.
    """
    try:
        return make(**arguments)
    except (Exception, SystemExit) as error:  # a user's code may fail in any way
        raise SettingsError(
            f"{what}: the callable raised {type(error).__name__}: {' '.join(str(error).split())}; it "
            f"is called with {', '.join(arguments) or 'no arguments'}"
        ) from error

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

VERSION = "__softcache_version__"  # attribute of such a module: which state of the file it is
PREFIX = "softcache_user_"  # of the modules made from the user's files


def import_callable(spec: str, *, what: str) -> Callable[..., Any]:
    """Import the callable that `spec` names.

    Args:
        spec: `FILE.py:CALLABLE` or `package.module:CALLABLE`.
        what: the role of the callable in error messages, such as "model".

    Raises:
        SettingsError: the file, module or attribute does not exist, the import fails, or the attribute is
            not callable.
    """
    module_spec, _, attribute = spec.rpartition(":")
    try:
        if module_spec.endswith(".py"):
            module = _import_file(Path(module_spec))
        else:
            module = _import_module(module_spec)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:  # a user's file can fail in any way
        raise SettingsError(
            f"{what} {spec}: {module_spec} fails on import with {type(error).__name__}: {error}"
        ) from error
    value = getattr(module, attribute, None)
    if not callable(value):
        raise SettingsError(
            f"{what} {spec}: {module_spec} has no callable {attribute!r}; expected FILE.py:CALLABLE or "
            "package.module:CALLABLE"
        )
    return value  # type: ignore[no-any-return]  # callable() narrows Any no further


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}; expected FILE.py:CALLABLE")
    # Registered in sys.modules so that loader workers and pickle find its classes; the name comes from
    # the whole path, since two files may both be called models.py.
    name = f"{PREFIX}{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    known, status = sys.modules.get(name), path.stat()
    version = (status.st_mtime_ns, status.st_size, status.st_ino)
    # once for all callables in it: pickle finds a class only if there is one class of its name
    if known is not None and getattr(known, VERSION, None) == version:
        return known
    module = _import_as(name, path)
    setattr(module, VERSION, version)
    return module


def imported_files() -> dict[str, str]:
    """The user's files that this process has imported: their absolute paths, by the names of the modules."""
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith(PREFIX)]
    return {name: str(Path(str(module.__file__)).absolute()) for name, module in modules}


def import_again(name: str, path: str) -> None:
    """Import a file of imported_files() in another process, unless it has it already."""
    if name not in sys.modules:
        _import_as(name, Path(path))


def _import_as(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path} cannot be imported as a Python file")
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
                f"no module named {error.name!r}; install it, or run where Python can find it"
            ) from error
        raise


def call_user(make: Callable[..., Any], *, what: str, **arguments: object) -> Any:  # noqa: ANN401
    """Call a user's callable with keyword arguments.

    Raises:
        SettingsError: the callable raises, or does not accept these arguments.
    """
    try:
        return make(**arguments)
    except (Exception, SystemExit) as error:  # a user's code can fail in any way
        raise SettingsError(
            f"{what}: the callable raised {type(error).__name__}: {' '.join(str(error).split())}; it "
            f"is called with {', '.join(arguments) or 'no arguments'}"
        ) from error

"""Checkpoints as people save them: the mappings of tensors in them, read without running any code.

Beside the weights there are often settings in objects of other classes. Those in STAND_INS are read as
inert objects: neither the class nor anything else that the file names is imported or called.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softcache.errors import MissingModelError, ModelError
from softcache.util.messages import first_line

State = dict[str, Tensor]

DEPTH = 3  # levels of dictionaries below the outermost one in which tensors are looked for

# settings and measurements that training scripts save beside the weights
INERT = (
    "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.timedelta",
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.Path",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "torch.torch_version.TorchVersion",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
DICTIONARIES = (
    "collections.defaultdict", "yacs.config.CfgNode", "fvcore.common.config.CfgNode",
    "easydict.EasyDict", "addict.addict.Dict", "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict",
)  # fmt: skip


class _Inert:
    """Takes the place of an object in a file; remembers nothing of it."""

    def __new__(cls, *arguments: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Dictionary:
    """Takes the place of a class of dictionaries; its objects are read as plain ones."""

    def __new__(cls, *arguments: object) -> Any:  # noqa: ANN401  # no instance of this class
        return OrderedDict[Any, Any]()


def _stand_in(name: str, base: type) -> type:
    """A class that torch's unpickler takes for the one of that name."""
    module, _, qualname = name.rpartition(".")
    return type(qualname, (base,), {"__module__": module, "__qualname__": qualname})


STAND_INS: list[Any] = [
    *(_stand_in(name, _Inert) for name in INERT),
    *(_stand_in(name, _Dictionary) for name in DICTIONARIES),
    _stand_in("builtins.list", _Inert),  # the factory of a defaultdict
    _stand_in("builtins.int", _Inert),
    _stand_in("builtins.float", _Inert),
]


def read_checkpoint(path: Path) -> object:
    """Read a file by torch.save() or of safetensors; no code in it is run.

    Raises:
        ModelError: the file does not exist, cannot be read, or holds objects that softcache never loads.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise MissingModelError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"weights {path} cannot be read: {type(error).__name__} {first_line(error)}"
        ) from error
    except Exception as error:  # torch raises pickle's own errors for what weights_only refuses
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        whose = f" ({name[1]})" if name else ""
        raise ModelError(
            f"weights {path} hold more than tensors, which softcache never loads{whose}; save "
            "model.state_dict() alone, preferably as safetensors"
        ) from error


def state_dicts(contents: object) -> dict[str, State]:
    """Every mapping from names to tensors in a checkpoint, by its place, such as "state_dict".

    Values of a mapping that are not tensors are left out.
    """
    if isinstance(contents, Mapping) and not contents:
        return {"": {}}
    return dict(_state_dicts(contents, "", DEPTH))


def _state_dicts(contents: object, place: str, depth: int) -> Iterator[tuple[str, State]]:
    if not isinstance(contents, Mapping):
        return
    tensors = {str(name): v for name, v in contents.items() if isinstance(v, Tensor)}
    if tensors and all(isinstance(name, str) for name in contents):
        yield place, tensors
    if depth:
        for name, inner in contents.items():
            yield from _state_dicts(inner, f"{place}.{name}".lstrip("."), depth - 1)

"""Whether an exported program, FILE.pt2, may run code of its own when torch.export.load() reads it.

The archive holds the graph of the model as JSON and its tensors as raw bytes, which are data. But it may
also hold pickles, compiled libraries, calls of any function in torch's namespace, and expressions that
sympy evaluates as Python.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAX_JSON = 256 << 20  # bytes of a JSON file in the archive
GRAPH = re.compile(r"(^|/)(models/[^/]+|serialized_exported_program)\.json$")
# names of parts, after that of the archive
PARTS = re.compile(
    r"[^/]+/(models/[^/]+\.json|data/(weights|constants|sample_inputs)/[^/]+|archive_format|archive_version"
    r"|byteorder|version|\.data/(version|serialization_id)|\.format_version|\.storage_alignment)"
    r"|serialized_(exported_program\.json|state_dict\.(pt|json)|constants\.(pt|json)|example_inputs\.pt)"
    r"|version"
)
TEXT_SUFFIXES = (".json",)
LIBRARIES = (".so", ".dll", ".dylib", ".pyd", ".cubin", ".o", ".cpp", ".py")
# operators that only compute; torch's namespace has others, such as torch.hub.load
TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|map_impl|scan|while_loop|wrap_with_set_grad_enabled"
    r"|wrap_with_autocast)"
    r"|torch\.sym_(int|float|ite|max|min|not|sum|sqrt|fresh_size)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_"
    r"|xor|lshift|rshift)"
    r"|math\.\w+"
)
# a size as sympy writes it, such as Symbol('s31', positive=True, integer=True)
WRITTEN_SYMBOL = re.compile(r"Symbol\('([szuf]+\d+)'((, \w+=(True|False))*)\)")
SYMBOL = re.compile(r"[szuf]+\d+|zuf\d+|unbacked\w*\d*")
FUNCTIONS = (
    "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "ModularIndexing", "Max", "Min", "Abs", "Eq", "Ne",
    "Integer", "Rational", "Float", "Where", "floor", "ceiling", "sqrt", "true", "false", "True", "False",
    "Pow", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "ToFloat", "TruncToInt", "FloorToInt",
    "CeilToInt", "RoundToInt", "Identity", "And", "Or", "Not", "oo", "int_oo", "Add", "Mul", "LessThan",
    "GreaterThan", "StrictLessThan", "StrictGreaterThan", "Equality", "Unequality",
)  # fmt: skip


def code_in(path: Path, copy: BinaryIO | None = None) -> str | None:
    """The first part of an archive that may run code, in a phrase; None if there is none.

    Args:
        path: the archive.
        copy: where a new archive of the parts that were checked is written, if there is no such part. That
            one is to be loaded: torch reads archives in another way than this function, and might find
            other contents in the same file.

    Raises:
        ValueError, zipfile.BadZipFile, OSError, KeyError: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(GRAPH.search(name) for name in names):
            raise ValueError("there is no graph in the archive")
        if len(set(names)) < len(names):
            return "two of its parts have the same name"
        unknown = [name for name in names if not PARTS.fullmatch(name)]
        if unknown:
            return f"{unknown[0][:80]} is no part of an exported program"
        found = next(_parts_with_code(archive), None)
        if found is None and copy is not None:
            with zipfile.ZipFile(copy, "w") as checked:
                for name in names:
                    checked.writestr(name, archive.read(name))
        return found


def _parts_with_code(archive: zipfile.ZipFile) -> Iterator[str]:
    pickled = set()
    for name in archive.namelist():
        if name.endswith(LIBRARIES) or "aotinductor" in name:
            yield f"{name} is compiled code"
        if not name.endswith(TEXT_SUFFIXES):
            continue
        if archive.getinfo(name).file_size > MAX_JSON:
            yield f"{name} has {archive.getinfo(name).file_size:,} bytes"
            continue
        contents = json.loads(archive.read(name))
        yield from _calls(contents)
        if name.endswith("_config.json"):
            folder = name.rpartition("/")[0]
            for payload in dict(contents.get("config", {})).values():
                entry = f"{folder}/{payload['path_name']}"
                if not str(payload["path_name"]).startswith(("weight_", "tensor_")):
                    yield f"{entry} is an object of a class of its own"
                if payload.get("use_pickle") or payload.get("tensor_meta") is None:
                    pickled.add(entry)
    for name in archive.namelist():
        is_pickle = name in pickled or name.endswith((".pt", ".pkl", ".pickle"))
        if (
            is_pickle
            and archive.getinfo(name).file_size
            and not _is_weights_only(archive.read(name))
        ):
            yield f"{name} is a pickle of more than tensors"


def _is_weights_only(contents: bytes) -> bool:
    try:
        torch.load(io.BytesIO(contents), weights_only=True, map_location="cpu")
    except Exception:  # pickle raises errors of many types
        return False
    return True


def _calls(value: Any) -> Iterator[str]:  # noqa: ANN401  # any JSON
    """Functions that a graph calls, and expressions in it, that are not known to compute only."""
    if isinstance(value, list):
        for item in value:
            yield from _calls(item)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "target" and isinstance(item, str) and not TARGETS.fullmatch(item):
            # an input or a parameter has a target too: its plain name
            if item.startswith(("torch", "_operator", "math", "#")) or "inputs" in value:
                yield f"it calls {item[:80]!r}"
        elif key == "expr_str" and not _is_arithmetic(item):
            yield f"it evaluates {str(item)[:80]!r}"
        else:
            yield from _calls(item)


def _is_arithmetic(expression: object) -> bool:
    """Whether an expression has only numbers, symbols of sizes, and functions of sizes."""
    if not isinstance(expression, str):
        return False
    expression = WRITTEN_SYMBOL.sub(r"\1", expression)
    if not re.fullmatch(r"[\w\s+\-*/%(),.<>=&|~!]*", expression):
        return False
    if re.search(r"\.\s*[A-Za-z_]", expression):  # an attribute
        return False
    names = re.findall(r"[A-Za-z_]\w*", expression)
    return all(SYMBOL.fullmatch(name) or name in FUNCTIONS for name in names)

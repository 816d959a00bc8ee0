"""The kinds of teachers besides models, and how each is written on the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from urllib.parse import unquote_plus

from softcache.errors import SettingsError
from softcache.models.spec import KINDS as MODEL_KINDS
from softcache.models.spec import NORMALIZE, normalization, parse_model, split_file_options
from softcache.teachers.server_options import FORM, OPTIONS, SERVER, parse_server
from softcache.util.spec import CODE, Kind, Spec, check_options, forms, split_options, unescape

MATRIX_FILES = (".npy", ".npz", ".pt")
TOKEN_FILES = (".jsonl", ".parquet")
MATRIX_KINDS = ("matrix", "hfds", "tokens")  # precomputed outputs, one row per sample or token

# the handler takes (Spec, number of classes) and returns (module, provenance)
KINDS = {
    "onnx": Kind(
        "FILE.onnx",
        "a model that onnxruntime runs (onnx extra)",
        "softcache.teachers.onnx_file:open_onnx",
    ),
    "matrix": Kind(
        "FILE.npy, .npz, .pt",
        "a matrix of precomputed outputs, one row per sample; see softcache import",
        "softcache.teachers.matrix:open_matrix",
    ),
    "hfds": Kind(
        "hfds:ID_OR_FOLDER?ids=COLUMN&log_probs=COLUMN",
        "the largest log-probabilities of each sample or token; see softcache import",
        "softcache.teachers.top_tokens:open_hub_rows",
    ),
    "tokens": Kind(
        "FILE.jsonl, .parquet",
        "the largest log-probabilities of each token, as trainers and servers write them; see softcache "
        "import",
        "softcache.teachers.top_tokens:open_top_tokens",
        file=True,
    ),
    SERVER: Kind(
        FORM,
        "a language model behind a server of vLLM, or of SGLang with &api=sglang; dump only, of tokens",
        "softcache.teachers.server:open_server",
        OPTIONS,
    ),
}
TOKEN_OPTIONS = ("ids", "log_probs", "rows", "config")
ALL_KINDS = {
    **MODEL_KINDS,
    CODE: Kind(
        "FILE.py:CALLABLE",
        "your own callable (or package.module:CALLABLE) that returns a torch nn.Module, a scikit-learn or "
        "XGBoost estimator, or a function from numpy inputs (B, ...) to (B, classes)",
    ),
    **KINDS,
}


def parse_teacher(text: str) -> Spec:
    """Parse a teacher specification; nothing is opened, built or imported.

    Any teacher takes the option classes=A,B,C: the names of its columns, in order.

    Raises:
        SettingsError: `text` is not a teacher specification.
    """
    without, names = _split_classes(text)
    if names is None:
        return _parse(text)
    spec = _parse(without)
    return replace(spec, text=text, options={**spec.options, "classes": names})


def _split_classes(text: str) -> tuple[str, str | None]:
    """The specification without its option `classes`, and the value of that; None if it is not given."""
    ends = "&@" if text.startswith("hfds:") else "&"
    found = re.search(rf"([?&])classes=([^{ends}]*)(&?)", text)
    if found is None:
        return text, None
    joint = found[1] if found[3] else ""
    return text[: found.start()] + joint + text[found.end() :], unquote_plus(found[2])


def _parse(text: str) -> Spec:
    """The specification of a teacher without the option `classes`."""
    if text.startswith(f"{SERVER}:"):
        return parse_server(text)
    file, options = split_file_options(text, ".onnx")
    if file.endswith(".onnx"):
        check_options(options, NORMALIZE, text)
        normalization(options, text)
        return Spec(text, "onnx", file, options=options, file=True)
    if text.endswith(MATRIX_FILES):
        return Spec(text, "matrix", unescape(text), file=True)
    if text.rpartition("?")[0].endswith(MATRIX_FILES):
        raise SettingsError(
            f"teacher {text!r}: a matrix of outputs takes no options but classes=A,B,C, since it has no "
            "inputs; leave them out"
        )
    for suffix in TOKEN_FILES:
        file, options = split_file_options(text, suffix)
        if file.endswith(suffix) and not text.startswith("hfds:"):
            check_options(options, TOKEN_OPTIONS, text)
            if len({"ids", "log_probs"} & set(options)) == 1:
                raise SettingsError(
                    f"teacher {text}: ids= and log_probs= go together; give both columns"
                )
            return Spec(text, "tokens", file, options=options, file=True)
    if not text.startswith("hfds:"):
        try:
            return parse_model(text)
        except SettingsError as error:
            raise SettingsError(str(error).replace(forms(MODEL_KINDS), forms(ALL_KINDS))) from error
    where, _, split = text.removeprefix("hfds:").rpartition("@")
    place, options = split_options(where or split)
    if set(options) - {*TOKEN_OPTIONS, "name"} or len({"ids", "log_probs"} & set(options)) == 1:
        raise SettingsError(f"teacher {text}: expected {KINDS['hfds'].form}@SPLIT")
    return Spec(text, "hfds", place, options=options, split=split if where else "")

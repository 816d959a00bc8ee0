"""The kinds of models, and how each is written on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from softcache.errors import SettingsError
from softcache.util.spec import (
    CODE,
    Kind,
    Spec,
    check_options,
    forms,
    split_callable,
    split_options,
    unescape,
)

BUILT_IN = ("mlp", "cnn", "resnet")  # kinds that come without weights
HUB = ("hf", "timm")  # kinds from other libraries, with weights and preprocessing
NORMALIZE = ("normalize", "mean", "std")  # options that normalize the inputs of any other kind

# the handler takes (Spec, input shape, number of classes) and returns an nn.Module
KINDS = {
    "mlp": Kind(
        "mlp:SIZES",
        "a multilayer perceptron with ReLU; mlp:800,800 has two hidden layers of width 800",
        "softcache.models.builtin:build_mlp",
    ),
    "cnn": Kind(
        "cnn:WIDTHS",
        "convolutions with batch norm; cnn:32x2,64x2 has two layers of width 32, then two of 64",
        "softcache.models.builtin:build_cnn",
    ),
    "resnet": Kind(
        "resnet:DEPTH,WIDTH",
        "the residual network for CIFAR; resnet:20,16 has 20 layers, the first of width 16",
        "softcache.models.builtin:build_resnet",
    ),
    "hf": Kind(
        "hf:ID_OR_FOLDER",
        "an image or text classifier from transformers (hf extra)",
        "softcache.models.hf:build_hf",
        None,
    ),
    "timm": Kind(
        "timm:NAME",
        "an image classifier from timm (timm extra)",
        "softcache.models.timm:build_timm",
        None,
    ),
    CODE: Kind(
        "FILE.py:CALLABLE",
        "your own callable (or package.module:CALLABLE) that returns a torch nn.Module",
        "softcache.models.code:build_from_code",
    ),
    "pt2": Kind(
        "FILE.pt2",
        "a program saved by torch.export",
        "softcache.models.exported:build_exported",
        file=True,
    ),
}


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, for inputs in [0, 1]; one of each for all channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NORMALIZATIONS = {"imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


def parse_model(text: str) -> Spec:
    """Parse a model specification; nothing is built or imported.

    Raises:
        SettingsError: `text` is not a model specification.
    """
    name, _, rest = text.partition(":")
    if name in BUILT_IN:
        place, options = split_options(rest)
        return Spec(text, name, place, options=_normalize_options(options, text))
    if name in HUB:
        place, options = split_options(rest)
        if not place:
            raise SettingsError(
                f"model {text!r} does not say which model; expected {KINDS[name].form}"
            )
        if options.get("pretrained", "true") not in ("true", "false"):
            raise SettingsError(f"model {text!r}: expected pretrained=true or pretrained=false")
        asked = sorted(set(options) & set(NORMALIZE))
        if asked:
            raise SettingsError(
                f"model {text!r}: {name}: models normalize their inputs themselves, with the values that "
                f"they were trained with; leave {asked[0]} out"
            )
        return Spec(text, name, place, options=options)
    place, options = split_file_options(text, ".pt2")
    if place.endswith(".pt2"):
        return Spec(text, "pt2", place, options=_normalize_options(options, text), file=True)
    if not rest:
        raise SettingsError(f"model {text!r} is not a model specification; expected {forms(KINDS)}")
    place, attribute = split_callable(text)
    attribute, options = split_options(attribute)
    return Spec(text, CODE, unescape(place), attribute, options=_normalize_options(options, text))


def split_file_options(text: str, suffix: str) -> tuple[str, dict[str, str]]:
    """Split FILE?OPTIONS, if FILE ends with `suffix`, into both; the whole text and no options if not."""
    file, mark, query = text.rpartition("?")
    if not mark or not file.endswith(suffix):
        return unescape(text), {}
    return unescape(file), split_options(f"?{query}")[1]


def normalization(options: Mapping[str, str], text: str) -> Normalization | None:
    """The normalization that options ask for; None if they ask for none.

    Args:
        text: the specification, for messages.

    Raises:
        SettingsError: the values are not those of a normalization.
    """
    named = options.get("normalize")
    if named is not None:
        if named not in NORMALIZATIONS or len(set(options) & set(NORMALIZE)) > 1:
            raise SettingsError(
                f"model {text!r}: normalize={named}; expected normalize={' or '.join(NORMALIZATIONS)} "
                "alone, or mean= and std="
            )
        return NORMALIZATIONS[named]
    if "mean" not in options and "std" not in options:
        return None
    if not ("mean" in options and "std" in options):
        raise SettingsError(f"model {text!r} has one of mean= and std=; expected both")
    mean, std = (_numbers(name, options[name], text) for name in ("mean", "std"))
    if len(mean) != len(std):
        raise SettingsError(
            f"model {text!r} has {len(mean)} means and {len(std)} standard deviations; expected a pair for "
            "each channel"
        )
    if min(std) <= 0:
        raise SettingsError(f"model {text!r}: std={options['std']}; expected numbers above 0")
    return Normalization(mean, std)


def _normalize_options(options: dict[str, str], text: str) -> dict[str, str]:
    """The options, if they are those of a normalization."""
    check_options(options, NORMALIZE, text)
    normalization(options, text)
    return options


def _numbers(name: str, written: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(number) for number in written.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise SettingsError(
            f"model {text!r}: {name}={written}; expected a number for each channel, as in {name}=0.5,0.5,0.5"
        )
    return numbers


def is_pretrained(spec: Spec) -> bool:
    """Whether a model from another library is loaded with its pretrained weights."""
    return spec.options.get("pretrained", "true") == "true"

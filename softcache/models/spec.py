"""The kinds of models, and how each is written on the command line."""

from __future__ import annotations

from softcache.errors import SettingsError
from softcache.util.spec import CODE, Kind, Spec, forms, split_callable, split_options

BUILT_IN = ("mlp", "cnn", "resnet")  # kinds that come without weights
HUB = ("hf", "timm")  # kinds from other libraries, with weights and preprocessing

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


def parse_model(text: str) -> Spec:
    """Parse a model specification; nothing is built or imported.

    Raises:
        SettingsError: `text` is not a model specification.
    """
    name, _, rest = text.partition(":")
    if name in BUILT_IN:
        return Spec(text, name, rest)
    if name in HUB:
        place, options = split_options(rest)
        if not place:
            raise SettingsError(
                f"model {text!r} does not say which model; expected {KINDS[name].form}"
            )
        if options.get("pretrained", "true") not in ("true", "false"):
            raise SettingsError(f"model {text!r}: expected pretrained=true or pretrained=false")
        return Spec(text, name, place, options=options)
    if text.endswith(".pt2"):
        return Spec(text, "pt2", text, file=True)
    if not rest:
        raise SettingsError(f"model {text!r} is not a model specification; expected {forms(KINDS)}")
    place, attribute = split_callable(text)
    return Spec(text, CODE, place, attribute)


def is_pretrained(spec: Spec) -> bool:
    """Whether a model from another library is loaded with its pretrained weights."""
    return spec.options.get("pretrained", "true") == "true"

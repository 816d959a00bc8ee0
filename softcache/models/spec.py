"""Which kinds of models there are, and how each is named on the command line."""

from __future__ import annotations

from softcache.errors import SettingsError
from softcache.util.spec import CODE, Kind, Spec, forms, split_callable, split_options

BUILT_IN = ("mlp", "cnn", "resnet")  # kinds without weights of their own
HUB = ("hf", "timm")  # kinds of other libraries, with weights and preprocessing

# the handler takes (Spec, input shape, number of classes) and returns an nn.Module
KINDS = {
    "mlp": Kind(
        "mlp:SIZES",
        "fully connected with ReLU; mlp:800,800 has two hidden layers of 800",
        "softcache.models.builtin:build_mlp",
    ),
    "cnn": Kind(
        "cnn:WIDTHS",
        "convolutions with batch norm; cnn:32x2,64x2 has two of width 32, then two of 64",
        "softcache.models.builtin:build_cnn",
    ),
    "resnet": Kind(
        "resnet:DEPTH,WIDTH",
        "the residual network for CIFAR; resnet:20,16 has depth 20 and first width 16",
        "softcache.models.builtin:build_resnet",
    ),
    "hf": Kind(
        "hf:ID_OR_FOLDER",
        "an image or text classifier of transformers (hf extra)",
        "softcache.models.hf:build_hf",
        None,
    ),
    "timm": Kind(
        "timm:NAME",
        "an image classifier of timm (timm extra)",
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
    """Take a model specification apart; nothing is built or imported.

    Raises:
        SettingsError: it has none of the known forms.
    """
    name, _, rest = text.partition(":")
    if name in BUILT_IN:
        return Spec(text, name, rest)
    if name in HUB:
        place, options = split_options(rest)
        if not place:
            raise SettingsError(f"model {text!r} names none; expected {KINDS[name].form}")
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
    """Whether a model of another library comes with its weights."""
    return spec.options.get("pretrained", "true") == "true"

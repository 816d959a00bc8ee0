"""Teachers and students from a specification.

    mlp:800,800            fully connected, ReLU, hidden sizes 800 and 800
    cnn:32x2,64x2          convolutions with batch normalization: 2 of width 32, then 2 of width 64
    resnet:20,16           the residual network of CIFAR, depth 20, first width 16
    hf:ID_OR_FOLDER        an image or text classifier of transformers, see hub_models.py
    timm:NAME              an image classifier of timm
    FILE.py:CALLABLE       or package.module:CALLABLE, returns an nn.Module
    FILE.pt2               an exported program

Input shape and number of classes of the built-in ones come from the data, as do the classes of hf: and timm:.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from softcache.errors import ModelError, SettingsError
from softcache.models.builtin import cnn, image_channels, mlp, parse_sizes, parse_stages, resnet
from softcache.models.exported import load_exported
from softcache.models.hf import build_hf
from softcache.models.hub import HubModel
from softcache.models.spec import is_hub
from softcache.models.timm import build_timm
from softcache.util.callables import call_user, import_callable
from softcache.util.spec import split_options

FORMS = (
    "mlp:SIZES, cnn:WIDTHS, resnet:DEPTH,WIDTH, hf:ID_OR_FOLDER, timm:NAME, FILE.py:CALLABLE, "
    "package.module:CALLABLE or FILE.pt2"
)


def build(spec: str, *, input_shape: Sequence[int], classes: int) -> nn.Module:
    """The model that `spec` names, on the CPU.

    Args:
        input_shape: shape of one input, without the batch.
        classes: width of the output of the built-in architectures.

    Raises:
        SettingsError: the specification has none of the known forms.
        ModelError: what it names cannot be built.
    """
    name, _, rest = spec.partition(":")
    if name == "mlp":
        return mlp(input_shape, parse_sizes(rest, spec, "mlp:800,800"), classes)
    if name == "cnn":
        return cnn(image_channels(spec, input_shape), parse_stages(rest, spec), classes)
    if name == "resnet":
        sizes = parse_sizes(rest, spec, "resnet:20,16")
        if len(sizes) != 2 or sizes[0] < 8 or (sizes[0] - 2) % 6:
            raise SettingsError(
                f"model {spec!r}: expected resnet:DEPTH,WIDTH with a depth of 6n + 2 (8, 14, 20, …)"
            )
        return resnet(image_channels(spec, input_shape), sizes[0], sizes[1], classes)
    if is_hub(spec):
        return build_hub(spec, classes)
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))
    if not rest:
        raise SettingsError(f"model {spec!r} is no model specification; expected {FORMS}")
    model = call_user(import_callable(spec, what="model"), what=f"model {spec}")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {spec} returned {type(model).__name__}; expected a torch nn.Module"
        )
    return model


def build_hub(spec: str, classes: int | None) -> HubModel:
    """The model that `spec` names, on the CPU.

    Args:
        classes: of a student, whose last layer is made anew where it has another number; None of a
            teacher, which must have all its weights.

    Raises:
        SettingsError: the library is not there, or an option makes no sense.
        ModelError: the model cannot be loaded, or is no classifier of images or texts.
    """
    place, options = split_options(spec)
    kind, _, rest = place.partition(":")
    if options.get("pretrained", "true") not in ("true", "false"):
        raise SettingsError(f"model {spec!r}: expected pretrained=true or pretrained=false")
    pretrained = options.pop("pretrained", "true") == "true"
    if not rest:
        raise SettingsError(f"model {spec!r} names none; expected {kind}:NAME")
    build = build_hf if kind == "hf" else build_timm
    try:
        return build(spec, rest, options, classes, pretrained)
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # the libraries raise many kinds
        gone = isinstance(error, OSError) and not Path(rest).expanduser().exists()
        here = f"; there is no folder {rest} here" if gone else ""
        raise ModelError(
            f"model {spec} cannot be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}){here}"
        ) from error

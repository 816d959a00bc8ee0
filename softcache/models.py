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

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.hub_models import build_hub, is_hub, public_hub_name
from softcache.util.callables import call_user, import_callable
from softcache.util.messages import first_line

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
        return mlp(input_shape, _sizes(rest, spec, "mlp:800,800"), classes)
    if name == "cnn":
        return cnn(_image_channels(spec, input_shape), _stages(rest, spec), classes)
    if name == "resnet":
        sizes = _sizes(rest, spec, "resnet:20,16")
        if len(sizes) != 2 or sizes[0] < 8 or (sizes[0] - 2) % 6:
            raise SettingsError(
                f"model {spec!r}: expected resnet:DEPTH,WIDTH with a depth of 6n + 2 (8, 14, 20, …)"
            )
        return resnet(_image_channels(spec, input_shape), sizes[0], sizes[1], classes)
    if is_hub(spec):
        return build_hub(spec, classes)
    if spec.endswith(".pt2"):
        return _load_exported(Path(spec))
    if not rest:
        raise SettingsError(f"model {spec!r} is no model specification; expected {FORMS}")
    model = call_user(import_callable(spec, what="model"), what=f"model {spec}")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {spec} returned {type(model).__name__}; expected a torch nn.Module"
        )
    return model


def public_name(spec: str) -> str:
    """The specification without folders: what may be written into a shared file."""
    if is_hub(spec):
        return public_hub_name(spec)
    place, colon, rest = spec.rpartition(":")
    return f"{Path(place).name}:{rest}" if colon else Path(spec).name


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_weights(model: nn.Module, path: Path) -> None:
    """Load safetensors, or a checkpoint of tensors as torch.save writes it (weights_only).

    Raises:
        ModelError: no such file, not such a file, or its names or shapes do not fit the model.
    """
    state = read_weights(path)
    wanted = model.state_dict()
    problems = [
        *(f"{name} is missing" for name in wanted if name not in state),
        *(f"{name} is not in the model" for name in state if name not in wanted),
        *(
            f"{name} is {tuple(state[name].shape)} in the file, {tuple(wanted[name].shape)} "
            "in the model"
            for name in wanted
            if name in state and state[name].shape != wanted[name].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(
            f"weights {path} do not fit the model: {'; '.join(problems[:5])}{more}; "
            "check the model's specification against the one the weights were made with"
        )
    model.load_state_dict(state)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; nothing in it is run.

    Raises:
        ModelError: no such file, or it holds anything but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return _plain_names(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"weights {path} cannot be read: {type(error).__name__} {first_line(error)}"
        ) from error
    except Exception as error:  # torch raises pickle's own errors for what weights_only refuses
        raise ModelError(
            f"weights {path} hold more than tensors, which is never loaded; save model.state_dict() "
            "alone, best as safetensors"
        ) from error
    for nested in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(nested), dict):
            state = state[nested]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"weights {path} hold no state dict; expected tensors by name")
    return _plain_names(state)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel puts before every name."""
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mlp(input_shape: Sequence[int], hidden: Sequence[int], classes: int) -> nn.Module:
    """A multi-layer perceptron with ReLU on the flattened input."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = int(torch.Size(input_shape).numel())
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn(channels: int, stages: Sequence[tuple[int, int]], classes: int) -> nn.Module:
    """3x3 convolutions in stages of (width, how many); the last of a stage has stride 2.

    Strides in place of pooling follow Springenberg et al., "Striving for simplicity: the all
    convolutional net" (arXiv 1412.6806); the mean over all places goes to one linear layer.
    """
    layers: list[nn.Module] = []
    for width, repeats in stages:
        for place in range(repeats):
            layers.append(_conv_bn(channels, width, stride=2 if place == repeats - 1 else 1))
            layers.append(nn.ReLU())
            channels = width
    return _channels_last(OrderedDict(features=nn.Sequential(*layers)), channels, classes)


def resnet(channels: int, depth: int, width: int, classes: int) -> nn.Module:
    """The residual network for CIFAR of He et al. (arXiv 1512.03385), section 4.2, 6n + 2 layers.

    Shortcuts that change the shape are 1x1 convolutions (their option B).
    """
    layers: list[nn.Module] = [_conv_bn(channels, width, stride=1), nn.ReLU()]
    channels = width
    for stage in range(3):
        for place in range((depth - 2) // 6):
            out = width * 2**stage
            layers.append(_Residual(channels, out, stride=2 if stage and not place else 1))
            channels = out
    return _channels_last(OrderedDict(features=nn.Sequential(*layers)), channels, classes)


class _Residual(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv_bn(channels, width, stride), nn.ReLU(), _conv_bn(width, width, stride=1)
        )
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else _conv_bn(channels, width, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _ChannelsLast(nn.Module):
    """Images in the memory layout in which convolutions are fastest; values are unchanged."""

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def _channels_last(layers: OrderedDict[str, nn.Module], width: int, classes: int) -> nn.Module:
    model = nn.Sequential(
        OrderedDict(
            layout=_ChannelsLast(),
            **layers,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(width, classes),
        )
    )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _conv_bn(channels: int, width: int, stride: int, kernel: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
    )


def _load_exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"model {path}: no such file")
    try:
        return _Exported(torch.export.load(path).module())
    except Exception as error:  # a damaged archive fails in many ways
        raise ModelError(f"model {path} is no exported program: {first_line(error)}") from error


class _Exported(nn.Module):
    """An exported program; it was exported in train or eval mode and cannot change it."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, inputs: Tensor) -> Tensor:
        return self.program(inputs)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> _Exported:
        self.training = mode
        return self


def _sizes(text: str, spec: str, example: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise SettingsError(f"model {spec!r}: expected sizes from 1 up, as in {example}")
    return [int(size) for size in sizes]


def _stages(text: str, spec: str) -> list[tuple[int, int]]:
    stages = [re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", stage) for stage in text.split(",")]
    if not all(stages):
        raise SettingsError(f"model {spec!r}: expected widths, as in cnn:16,32 or cnn:32x2,64x2")
    return [(int(stage[1]), int(stage[2] or 1)) for stage in stages if stage]


def _image_channels(spec: str, input_shape: Sequence[int]) -> int:
    if len(input_shape) != 3:
        raise ModelError(
            f"model {spec}: inputs of shape {tuple(input_shape)} are not images (channels, height, "
            "width); use mlp:SIZES, or a model of your own"
        )
    return input_shape[0]

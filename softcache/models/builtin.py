"""The built-in architectures, small enough to read."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from softcache.errors import ModelError, SettingsError
from softcache.util.spec import Spec

MAX_LAYERS = 2000
T = TypeVar("T")


def build_mlp(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Build `mlp:SIZES`, such as `mlp:800,800`."""
    return mlp(input_shape, _sizes(spec, "mlp:800,800"), classes)


def build_cnn(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Build `cnn:WIDTHS`, such as `cnn:32x2,64x2`."""
    return cnn(_channels(spec, input_shape), _stages(spec), classes)


def build_resnet(spec: Spec, input_shape: Sequence[int], classes: int) -> nn.Module:
    """Build `resnet:DEPTH,WIDTH`, such as `resnet:20,16`."""
    sizes = _sizes(spec, "resnet:20,16")
    if len(sizes) != 2 or sizes[0] < 8 or (sizes[0] - 2) % 6:
        raise SettingsError(
            f"model {spec.text!r}: expected resnet:DEPTH,WIDTH with a depth of 6n + 2 (8, 14, 20, …)"
        )
    _checked_depth(sizes, sizes[0], spec)
    return resnet(_channels(spec, input_shape), sizes[0], sizes[1], classes)


def mlp(input_shape: Sequence[int], hidden: Sequence[int], classes: int) -> nn.Module:
    """A multilayer perceptron with ReLU, on flattened inputs; a row of columns is standardized first."""
    is_row = len(input_shape) == 1
    layers: list[nn.Module] = [Standardize(input_shape[0]) if is_row else nn.Flatten()]
    width = int(torch.Size(input_shape).numel())
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, classes))


class Standardize(nn.Module):
    """Subtracts the mean of each column and divides by its standard deviation; NaN becomes 0, the mean.

    The statistics are saved with the weights. Until they are set, the columns stay as they are.

    Attributes:
        column_mean: (columns,) float32.
        column_std: (columns,) float32.
    """

    column_mean: Tensor
    column_std: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("column_mean", torch.zeros(columns))
        self.register_buffer("column_std", torch.ones(columns))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the statistics of the training data.

        Args:
            mean: (columns,).
            std: (columns,), 0 or more; 0 counts as 1.
        """
        self.column_mean.copy_(mean)
        self.column_std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (B, columns) to rows of mean 0 and standard deviation 1."""
        scaled = (rows - self.column_mean) / self.column_std
        return torch.where(torch.isnan(scaled), torch.zeros_like(scaled), scaled)


def standardize_columns(model: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Let the first layer of an `mlp:` take columns with these statistics; other models stay as they are.

    Args:
        mean: (columns,), such as softcache.data.tables.column_statistics() returns.
        std: (columns,).
    """
    for module in model.modules():
        if isinstance(module, Standardize):
            module.set_statistics(mean, std)


def cnn(channels: int, stages: Sequence[tuple[int, int]], classes: int) -> nn.Module:
    """3x3 convolutions in stages of (width, repeats); the last one of each stage has stride 2.

    Strides instead of pooling follow Springenberg et al., "Striving for simplicity: the all
    convolutional net" (arXiv 1412.6806). Global average pooling and one linear layer come last.
    """
    layers: list[nn.Module] = []
    for width, repeats in stages:
        for index in range(repeats):
            layers.append(_conv_bn(channels, width, stride=2 if index == repeats - 1 else 1))
            layers.append(nn.ReLU())
            channels = width
    return _channels_last(OrderedDict(features=nn.Sequential(*layers)), channels, classes)


def resnet(channels: int, depth: int, width: int, classes: int) -> nn.Module:
    """The CIFAR residual network of He et al. (arXiv 1512.03385), section 4.2, with 6n + 2 layers.

    Shortcuts that change the shape are 1x1 convolutions (their option B).
    """
    layers: list[nn.Module] = [_conv_bn(channels, width, stride=1), nn.ReLU()]
    channels = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            out = width * 2**stage
            layers.append(_Residual(channels, out, stride=2 if stage and not block else 1))
            channels = out
    return _channels_last(OrderedDict(features=nn.Sequential(*layers)), channels, classes)


class _Residual(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv_bn(channels, width, stride), nn.ReLU(), _conv_bn(width, width, stride=1)
        )
        same_shape = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same_shape else _conv_bn(channels, width, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _ChannelsLast(nn.Module):
    """Puts images into the memory layout in which convolutions are fastest; values stay the same."""

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


def _sizes(spec: Spec, example: str) -> list[int]:
    sizes = spec.place.split(",")
    if not all(re.fullmatch(r"0*[1-9]\d{0,6}", size, re.ASCII) for size in sizes):
        raise SettingsError(
            f"model {spec.text!r}: expected sizes of at least 1, as in {example}, and at most "
            "9,999,999"
        )
    return _checked_depth([int(size) for size in sizes], len(sizes), spec)


def _stages(spec: Spec) -> list[tuple[int, int]]:
    form = r"([1-9]\d{0,6})(?:x([1-9]\d{0,6}))?"
    stages = [re.fullmatch(form, stage, re.ASCII) for stage in spec.place.split(",")]
    if not all(stages):
        raise SettingsError(
            f"model {spec.text!r}: expected widths, as in cnn:16,32 or cnn:32x2,64x2"
        )
    sizes = [(int(stage[1]), int(stage[2] or 1)) for stage in stages if stage]
    return _checked_depth(sizes, sum(repeats for _, repeats in sizes), spec)


def _checked_depth(sizes: list[T], layers: int, spec: Spec) -> list[T]:
    """The sizes, if a network of so many layers can be built; a stranger's folder may name any number."""
    if layers > MAX_LAYERS:
        raise SettingsError(
            f"model {spec.text[:80]!r} has {layers:,} layers; expected at most {MAX_LAYERS:,}"
        )
    return sizes


def _channels(spec: Spec, input_shape: Sequence[int]) -> int:
    if len(input_shape) != 3:
        raise ModelError(
            f"model {spec.text}: inputs of shape {tuple(input_shape)} are not images (channels, height, "
            "width); use mlp:SIZES or your own model"
        )
    return input_shape[0]

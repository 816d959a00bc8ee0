"""Teachers of the GPU benchmark: torchvision's or timm's where they are installed, else our own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 1000


def tiny() -> nn.Module:
    """A teacher so small that everything around it shows."""
    layers: list[nn.Module] = []
    for before, width in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


def resnet50() -> nn.Module:
    """ResNet-50 with random weights: He et al. (arXiv 1512.03385), table 1."""
    try:
        from torchvision.models import resnet50 as build

        model: nn.Module = build(weights=None)
    except (ImportError, RuntimeError):  # its build may not fit this torch
        model = Bottlenecks((3, 4, 6, 3))
    return model


def vit_b_16() -> nn.Module:
    """ViT-B/16 with random weights: Dosovitskiy et al. (arXiv 2010.11929), table 1."""
    try:
        from torchvision.models import vit_b_16 as build

        model: nn.Module = build(weights=None)
    except (ImportError, RuntimeError):
        model = ViT()
    return model


def small_resnet() -> nn.Module:
    """The same kind of network in a size for a CPU."""
    return Bottlenecks((1, 1, 1, 1), width=8)


def small_vit() -> nn.Module:
    """The same kind of network in a size for a CPU."""
    return ViT(width=32, depth=2, heads=2, patch=8, image=32)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Bottlenecks(nn.Module):
    """Four stages of bottlenecks."""

    def __init__(self, depths: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]  # fmt: skip
        channels = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                layers.append(Bottleneck(channels, width * 2**stage, stride))
                channels = 4 * width * 2**stage
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Patches, a class token, and torch's own encoder layers."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, patch: int = 16, image: int = 224
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        tokens = (image // patch) ** 2 + 1
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (B, N, width)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])  # type: ignore[no-any-return]

"""Augmentation that can be replayed: a pure function of (seed, view, sample).

The random numbers of a sample are hashed from its coordinates, not drawn from a generator with a
state, so that a view is the same on any machine, in any order and for any batch size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data.augmentations import Op, parse_op
from softcache.errors import DataError, SettingsError
from softcache.types import Samples, Views
from softcache.util.callables import import_callable
from softcache.util.counter_rng import uniform
from softcache.util.spec import CODE, Spec, split_callable

# streams of random numbers of one sample, apart from those of its own operations, 0, 1, …
PARTNER_OPS_STREAM = 1 << 16
PARTNER_STREAM = 1 << 17
SHARE_STREAM = 1 << 18
TRANSFORM_STREAM = 1 << 19
PARTNER_TRANSFORM_STREAM = 1 << 20
EXTRA_STREAM = 1 << 21
ROTATION_STREAM = 1 << 40  # which view a sample begins with


@dataclass(frozen=True)
class Augmentation:
    """What makes a view of a sample: a user's own transform, operations on tensors, and mixup.

    Everything it draws follows from (seed, view, sample) alone.
    """

    spec: str | None
    seed: int
    total: int = 0  # samples in the data, among which mixup chooses
    transform: Callable[[Tensor], Tensor] | None = None
    ops: tuple[Op, ...] = ()
    mixup: bool = False

    def partners(self, view: Views, samples: Samples) -> Samples | None:
        """The sample that each of `samples` (B,) is mixed with; None without mixup."""
        if not self.mixup:
            return None
        return (self._draw(view, samples, PARTNER_STREAM) * self.total).astype(np.int64)

    def partner_weights(self, view: Views, samples: Samples) -> npt.NDArray[np.float64]:
        """The share of its partner in each sample (B,), uniform in [0, 1); 0 without mixup.

        Zhang et al., "mixup" (arXiv 1710.09412), with the uniform weights of Beyer et al. (arXiv
        2106.05237), section 3.
        """
        return self._draw(view, samples, SHARE_STREAM) if self.mixup else np.zeros(len(samples))

    def transformed(
        self, raw: Tensor, view: Views, samples: Samples, *, partner: bool = False
    ) -> Tensor:
        """Raw inputs (B, *shape) after the user's transform, each with random states of its own."""
        if self.transform is None:
            return raw
        stream = PARTNER_TRANSFORM_STREAM if partner else TRANSFORM_STREAM
        draws = uniform(self.seed, view, samples, stream=stream, draws=1)[:, 0]
        found = []
        views = np.broadcast_to(view, len(samples))
        for one, draw, sample, own in zip(raw, draws, samples, views, strict=True):
            try:
                found.append(_seeded(self.transform, one, int(draw * 2**32)))
            except Exception as error:  # a user's code may fail in any way
                raise DataError(
                    f"augmentation {self.spec} raised {type(error).__name__} on sample {sample} in view "
                    f"{own}, a tensor {tuple(one.shape)} of {one.dtype}: {' '.join(str(error).split())}"
                ) from error
        layouts = {(str(one.dtype), tuple(one.shape)) for one in found}
        if len(layouts) > 1:
            raise DataError(
                f"augmentation {self.spec} gives different shapes or types in one batch of "
                f"view {views[0]}: {sorted(layouts)}; it must give all samples one shape and one dtype"
            )
        return torch.stack(found)

    def __call__(
        self,
        inputs: Tensor,
        partners: Tensor | None,
        view: Views,
        samples: Samples,
        first_stream: int = 0,
    ) -> Tensor:
        """Augmented inputs (B, *shape) of float inputs, and of those of their partners.

        Raises:
            SettingsError: the inputs are not what the augmentation takes.
        """
        if (self.ops or self.mixup) and not inputs.is_floating_point():
            raise SettingsError(
                f"inputs are {inputs.dtype}, whole numbers of unknown meaning; --augment {self.spec} takes "
                "images of 8 or 16 unsigned bits, or floats"
            )
        mine = self._operate(inputs, view, samples, first_stream)
        if partners is None or not self.mixup:
            return mine
        theirs = self._operate(partners, view, samples, first_stream=PARTNER_OPS_STREAM)
        share = torch.from_numpy(self.partner_weights(view, samples)).to(mine)
        return torch.lerp(mine, theirs, share.view(-1, *[1] * (mine.ndim - 1)))

    def _operate(self, images: Tensor, view: Views, samples: Samples, first_stream: int) -> Tensor:
        if self.ops and images.ndim != 4:
            raise SettingsError(
                f"inputs of shape {tuple(images.shape[1:])} are not images (channels, height, width), "
                f"which is what --augment {self.spec} takes; leave it out, or give a callable"
            )
        for place, op in enumerate(self.ops, first_stream):
            images = op(images, uniform(self.seed, view, samples, stream=place, draws=op.draws))
        return images

    def _draw(self, view: Views, samples: Samples, stream: int) -> npt.NDArray[np.float64]:
        return uniform(self.seed, view, samples, stream=stream, draws=1)[:, 0]


@dataclass(frozen=True)
class AugmentSpec:
    """A specification such as `mine.py:crop,shift:2,flip,mixup`, taken apart; nothing is imported."""

    text: str
    code: Spec | None  # the user's own transform, which comes first
    operations: tuple[str, ...]
    mixup: bool

    @property
    def public_name(self) -> str | None:
        """The specification without folders: what may be written into a shared file."""
        if self.code is None:
            return self.text or None
        _, comma, rest = self.text.partition(",")
        return f"{self.code.public_name}{comma}{rest}"


def split_augment(text: str | None) -> AugmentSpec:
    """Take an augmentation apart; its operations are not checked yet.

    Raises:
        SettingsError: mixup is not the last part.
    """
    parts = text.split(",") if text else []
    mixup = "mixup" in parts
    if mixup and (parts.pop() != "mixup" or "mixup" in parts):
        raise SettingsError(f"augmentation {text!r}: mixup comes last, once")
    code = None
    if parts and ".py:" in parts[0]:
        place, attribute = split_callable(parts[0])
        code = Spec(parts.pop(0), CODE, place, attribute)
    return AugmentSpec(text or "", code, tuple(parts), mixup)


def parse_augment(text: str | None, *, seed: int, total: int) -> Augmentation:
    """The augmentation that a specification such as `shift:2,flip,mixup` names.

    Raises:
        SettingsError: an unknown name, a size out of range, or parts in an order that cannot be.
    """
    spec = split_augment(text)
    transform = import_callable(spec.code.text, what="augmentation") if spec.code else None
    ops = tuple(parse_op(part, spec.text) for part in spec.operations)
    return Augmentation(text, seed, total, transform, ops, spec.mixup)


def _seeded(transform: Callable[[Tensor], Tensor], sample: Tensor, seed: int) -> Tensor:
    """Call a user's transform with python, numpy and torch seeded, and put them back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # what a user's transform draws from
        # torch.manual_seed() would also look at every accelerator, at 250 times the cost
        torch.default_generator.manual_seed(seed)
        found = transform(sample)
        if not isinstance(found, Tensor | np.ndarray):
            raise TypeError(f"it returned {type(found).__name__}; expected a tensor or an array")
        return torch.as_tensor(found)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])

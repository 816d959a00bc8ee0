"""Augmentation that can be replayed: a pure function of (seed, view, sample id).

The random numbers of a sample are hashed from its coordinates instead of drawn from a generator with a
state, so a view is the same on any machine, in any order and with any batch size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softcache.data.augmentations import Crop, Flip, Op, Shift, parse_op
from softcache.errors import DataError, SettingsError
from softcache.types import SampleIds, Views
from softcache.util.callables import import_callable
from softcache.util.counter_rng import uniform
from softcache.util.messages import one_line
from softcache.util.spec import CODE, Spec, split_callable

# Streams of random numbers of a sample; its own operations use the streams 0, 1, …
PARTNER_OPS_STREAM = 1 << 16
PARTNER_STREAM = 1 << 17
PARTNER_WEIGHT_STREAM = 1 << 18
TRANSFORM_STREAM = 1 << 19
PARTNER_TRANSFORM_STREAM = 1 << 20
EXTRA_STREAM = 1 << 21
ROTATION_STREAM = 1 << 40  # which view a sample starts with


@dataclass(frozen=True)
class Augmentation:
    """What makes a view of a sample: a user's own transform, operations on tensors, and mixup.

    All random numbers follow from (seed, view, sample id) alone.

    Attributes:
        spec: the specification, as the user wrote it.
        seed: the seed of all random numbers.
        total: the number of samples in the data set, from which mixup chooses partners.
        transform: the user's own transform of one raw sample, applied first.
        ops: the built-in operations, in order.
        mixup: whether each sample is mixed with a partner, last.
    """

    spec: str | None
    seed: int
    total: int = 0
    transform: Callable[[Tensor], Tensor] | None = None
    ops: tuple[Op, ...] = ()
    mixup: bool = False

    def partners(self, view: Views, sample_ids: SampleIds) -> SampleIds | None:
        """The ids (B,) of the samples to mix into `sample_ids` (B,); None without mixup."""
        if not self.mixup:
            return None
        return (self._draw(view, sample_ids, PARTNER_STREAM) * self.total).astype(np.int64)

    def partner_weights(self, view: Views, sample_ids: SampleIds) -> npt.NDArray[np.float64]:
        """The weight 1 - lambda (B,) of each sample's partner, uniform in [0, 1); 0 without mixup.

        Zhang et al., "mixup" (arXiv 1710.09412), with the uniform weights of Beyer et al. (arXiv
        2106.05237), section 3.
        """
        if not self.mixup:
            return np.zeros(len(sample_ids))
        return self._draw(view, sample_ids, PARTNER_WEIGHT_STREAM)

    def transformed(
        self, raw: Tensor, view: Views, sample_ids: SampleIds, *, partner: bool = False
    ) -> Tensor:
        """Raw inputs (B, *shape) after the user's transform, which is seeded for each sample.

        Args:
            raw: (B, *shape), the inputs as the source returns them.
            view: one view for the whole batch, or (B,) one for each sample.
            sample_ids: (B,) ids of the samples, or of the samples whose partners are in `raw`.
            partner: whether `raw` holds the partners, which get random numbers of their own.

        Raises:
            DataError: the transform raises, or returns different shapes or dtypes within the batch.
        """
        if self.transform is None:
            return raw
        stream = PARTNER_TRANSFORM_STREAM if partner else TRANSFORM_STREAM
        draws = uniform(self.seed, view, sample_ids, stream=stream, draws=1)[:, 0]
        outputs = []
        views = np.broadcast_to(view, len(sample_ids))
        for sample, draw, sample_id, sample_view in zip(raw, draws, sample_ids, views, strict=True):
            try:
                outputs.append(_seeded(self.transform, sample, int(draw * 2**32)))
            except Exception as error:  # a user's code can fail in any way
                raise DataError(
                    f"augmentation {self.spec} raised {type(error).__name__} on sample {sample_id} in view "
                    f"{sample_view}, a tensor {tuple(sample.shape)} of {sample.dtype}: {one_line(error)}"
                ) from error
        layouts = {(str(output.dtype), tuple(output.shape)) for output in outputs}
        if len(layouts) > 1:
            raise DataError(
                f"augmentation {self.spec} returns different shapes or dtypes within one batch of view "
                f"{views[0]}: {sorted(layouts)}; it must return the same shape and dtype for every sample"
            )
        return torch.stack(outputs)

    def __call__(
        self,
        inputs: Tensor,
        partners: Tensor | None,
        view: Views,
        sample_ids: SampleIds,
        first_stream: int = 0,
    ) -> Tensor:
        """Apply the built-in operations and mixup.

        Args:
            inputs: (B, *shape) float, after the user's own transform.
            partners: (B, *shape), the inputs to mix in; None without mixup.
            view: one view for the whole batch, or (B,) one for each sample.
            sample_ids: (B,) ids of the samples.
            first_stream: the stream of random numbers that the first operation draws from.

        Returns:
            The augmented inputs, (B, *shape).

        Raises:
            SettingsError: the augmentation cannot be applied to inputs of this dtype or shape.
        """
        if (self.ops or self.mixup) and not inputs.is_floating_point():
            raise SettingsError(
                f"inputs are {inputs.dtype}, integers of unknown meaning; --augment {self.spec} takes "
                "uint8 or uint16 images, or floats"
            )
        inputs = self._operate(inputs, view, sample_ids, first_stream)
        if partners is None or not self.mixup:
            return inputs
        partners = self._operate(partners, view, sample_ids, first_stream=PARTNER_OPS_STREAM)
        weights = torch.from_numpy(self.partner_weights(view, sample_ids)).to(inputs)
        return torch.lerp(inputs, partners, weights.view(-1, *[1] * (inputs.ndim - 1)))

    def _operate(
        self, images: Tensor, view: Views, sample_ids: SampleIds, first_stream: int
    ) -> Tensor:
        if self.ops and images.ndim != 4:
            raise SettingsError(
                f"inputs of shape {tuple(images.shape[1:])} are not images (channels, height, width), "
                f"which is what --augment {self.spec} takes; leave it out, or use your own callable"
            )
        for stream, op in enumerate(self.ops, first_stream):
            images = op(images, uniform(self.seed, view, sample_ids, stream=stream, draws=op.draws))
        return images

    def moved(self, masks: Tensor, view: Views, sample_ids: SampleIds) -> Tensor:
        """Masks (B, 1, H, W) moved as the pixels of images are; nothing is mixed, and no value is changed.

        Raises:
            SettingsError: an operation changes images in a way that has no meaning for masks.
        """
        for stream, op in enumerate(self.ops):
            draws = uniform(self.seed, view, sample_ids, stream=stream, draws=op.draws)
            if isinstance(op, Crop):
                masks = op.sampled(masks, draws, mode="nearest")
            elif isinstance(op, Shift | Flip):
                masks = op(masks, draws)
        return masks

    def _draw(self, view: Views, sample_ids: SampleIds, stream: int) -> npt.NDArray[np.float64]:
        return uniform(self.seed, view, sample_ids, stream=stream, draws=1)[:, 0]


@dataclass(frozen=True)
class AugmentSpec:
    """A specification such as `mine.py:crop,shift:2,flip,mixup`, split into parts; nothing is imported."""

    text: str
    code: Spec | None  # the user's own transform, which is applied first
    operations: tuple[str, ...]
    mixup: bool

    @property
    def public_name(self) -> str | None:
        """The specification without folders, safe to write into a shared file; None if it is empty."""
        if self.code is None:
            return self.text or None
        _, comma, operations = self.text.partition(",")
        return f"{self.code.public_name}{comma}{operations}"


def split_augment(text: str | None) -> AugmentSpec:
    """Split an augmentation into parts; the operations are not checked yet.

    Raises:
        SettingsError: mixup is not the last part, or occurs twice.
    """
    parts = text.split(",") if text else []
    mixup = "mixup" in parts
    if mixup and (parts.pop() != "mixup" or "mixup" in parts):
        raise SettingsError(f"augmentation {text!r}: mixup must come last, and only once")
    code = None
    if parts and ".py:" in parts[0]:
        place, attribute = split_callable(parts[0])
        code = Spec(parts.pop(0), CODE, place, attribute)
    return AugmentSpec(text or "", code, tuple(parts), mixup)


def parse_augment(text: str | None, *, seed: int, total: int) -> Augmentation:
    """Make the augmentation that a specification such as `shift:2,flip,mixup` describes.

    Args:
        text: the specification; None or empty for no augmentation.
        seed: the seed of all random numbers.
        total: the number of samples in the data set, from which mixup chooses partners.

    Raises:
        SettingsError: a part is unknown, out of range or in the wrong position.
    """
    spec = split_augment(text)
    transform = import_callable(spec.code.text, what="augmentation") if spec.code else None
    ops = tuple(parse_op(part, spec.text) for part in spec.operations)
    return Augmentation(text, seed, total, transform, ops, spec.mixup)


def _seeded(transform: Callable[[Tensor], Tensor], sample: Tensor, seed: int) -> Tensor:
    """Call a user's transform with Python, numpy and torch seeded; restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # a user's transform draws from the global generator
        # torch.manual_seed() also seeds every accelerator, at 250 times the cost
        torch.default_generator.manual_seed(seed)
        output = transform(sample)
        if not isinstance(output, Tensor | np.ndarray):
            raise TypeError(f"it returned {type(output).__name__}; expected a tensor or an array")
        return torch.as_tensor(output)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])

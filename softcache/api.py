"""The Python interface: a cache opened for torch, and a Dataset whose samples carry soft targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from softcache.cache import Cache, Header
from softcache.cache.reader import open_trainable
from softcache.cache.verify import check_damage
from softcache.data.embedded import CacheSource
from softcache.data.loader import loader
from softcache.data.open import open_source
from softcache.data.source import Source
from softcache.data.user_dataset import DatasetSource
from softcache.errors import SettingsError
from softcache.files.pull import local_copy
from softcache.join.match import join
from softcache.targets.decode import to_dense
from softcache.targets.fetch import soft_targets
from softcache.types import MixedLabels, Targets

if TYPE_CHECKING:
    from softcache.train.student import Student

CPU = torch.device("cpu")


class SoftCache:
    """An open cache: what it says of itself, and its soft targets as tensors."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    @property
    def header(self) -> Header:
        """All that the cache says of itself."""
        return self.cache.header

    @property
    def temperature(self) -> float:
        return self.header.temperature

    @property
    def classes(self) -> int:
        return self.header.classes

    @property
    def views(self) -> int:
        return self.header.views

    @property
    def content_id(self) -> str:
        """SHA-256 over header and digests: one line that names every byte."""
        return self.cache.content_id()

    def __len__(self) -> int:
        return self.header.samples

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.cache.path,)  # a map of a file has no copy in another process

    def targets(
        self,
        rows: Sequence[int] | Tensor,
        *,
        view: int = 0,
        temperature: float | None = None,
        device: torch.device | str = CPU,
    ) -> Targets:
        """The teacher's log-probabilities of some samples.

        Args:
            rows: (B,) numbers of samples, 0 to len - 1, in the order of the data of the dump.
            view: 0 to views - 1.
            temperature: of the softmax; the cache's own by default.
            device: where they are wanted.

        Returns:
            (B, C) float32 log softmax(z / temperature); of topk and sampled caches SparseTargets, which
            distillation_loss() takes as they are and softcache.to_dense() makes dense.

        Raises:
            SettingsError: a row, the view or the temperature cannot be had.
        """
        at = np.asarray(rows, np.int64).reshape(-1)
        for name, number, end in (
            ("row", int(at.max(initial=0)), len(self)),
            ("row", int(at.min(initial=0)), len(self)),
            ("view", view, self.views),
        ):
            if not 0 <= number < end:
                raise SettingsError(
                    f"{name} {number} of {self.cache.path}; expected 0 to {end - 1}"
                )
        wanted = self.temperature if temperature is None else float(temperature)
        if not 0 < wanted < np.inf:
            raise SettingsError(f"temperature is {wanted}; expected a number above 0")
        return soft_targets(self.cache, wanted, torch.device(device))(np.asarray(view), at)


def dump(
    *,
    teacher: str | Sequence[str],
    data: str,
    out: str | Path,
    **settings: Any,  # fields of DumpConfig
) -> SoftCache:
    """Write a teacher's soft targets for every sample into one file, as `softcache dump` does.

    Args:
        teacher: the specification of a teacher, or of several whose probabilities are averaged.
        data: the specification of the samples.
        out: the file to write.
        settings: any other field of softcache.dump.config.DumpConfig, such as temperature=4.0.

    Returns:
        The finished cache. A dump that was stopped continues when it is called again.

    Raises:
        SoftcacheError: the settings, the data or the teacher are not as they should be.
    """
    from softcache.dump.config import DumpConfig
    from softcache.dump.loop import dump as run_dump

    return SoftCache(run_dump(DumpConfig(teacher=teacher, data=data, out=Path(out), **settings)))


def train(
    cache: str | Path | Sequence[str | Path] | None = None,
    *,
    student: str | Sequence[str],
    out: str | Path,
    **settings: Any,  # fields of TrainConfig and StudentConfig
) -> list[Student]:
    """Train students from a cache, as `softcache train` does.

    Args:
        cache: a cache, several, or URLs of caches; None trains on labels alone.
        student: the specification of a student, or of several that share all batches.
        out: the folder of the run.
        settings: any other field of softcache.train.config.TrainConfig or StudentConfig, such as
            data="folder:images", epochs=20, learning_rate=1e-3.

    Returns:
        The trained students, baselines last: `final_model` is an nn.Module, `evaluation` its test errors.

    Raises:
        SoftcacheError: the settings, the cache, the data or a student are not as they should be.
    """
    from softcache.train.config import make_train_config
    from softcache.train.loop import train as run_training

    places = [cache] if isinstance(cache, str | Path) else list(cache or ())
    config = make_train_config(
        student=student, cache=[local_copy(place) for place in places], out=Path(out), **settings
    )
    return run_training(config)


def open(path: str | Path, *, verify: bool = False) -> SoftCache:
    """Open a cache; nothing of it is read but header and digests.

    Args:
        path: or a URL, which is pulled into the cache folder first.
        verify: check every byte against its digest first.

    Raises:
        FormatError: it breaks a rule of the format, is unfinished, or is damaged.
    """
    cache = open_trainable(local_copy(path))
    if verify:
        check_damage(cache)
    return SoftCache(cache)


class SoftLabelDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The samples of a data set with the soft targets of exactly their pixels.

    An item is (input, label, log-probabilities): the input as the teacher saw it in the view of this
    epoch, float; the label int64, -1 where there is none or two samples of different labels are mixed;
    (C,) float32 log softmax(z / temperature). Samples are joined by their content, once, at the start; item i
    is sample i of the data set (of a shard, the i-th of its samples in the data set's order).
    """

    def __init__(
        self,
        dataset: Dataset[Any] | str | None,
        cache: SoftCache | str | Path,
        *,
        temperature: float | None = None,
        augment: str | None = None,
        rotate: bool = True,
    ) -> None:
        """Join a data set to a cache.

        Args:
            dataset: the map-style Dataset or the specification that the cache was dumped from; None:
                the samples in the cache itself.
            cache: an open one, or its file.
            temperature: of the soft targets; the cache's own by default.
            augment: the file of the cache's own callable, if it has one.
            rotate: whether each sample begins with another view, or an epoch is one view of all.

        Raises:
            DataError: these are not the samples of the cache; the first that differs is named.
            SettingsError: the temperature or the augmentation cannot be had.
        """
        self.cache = cache if isinstance(cache, SoftCache) else open(cache)
        self.temperature = float(temperature or self.cache.temperature)
        self.epoch = 0
        self._joined = join(
            _source_of(dataset, self.cache.cache),
            self.cache.cache,
            augment=augment,
            temperatures=[self.temperature],
            device=CPU,
            rotate=rotate,
        )
        self._rows = np.argsort(
            self._joined.source_indices
        )  # of the cache, in the order of the data set

    def __len__(self) -> int:
        return len(self._joined)

    def set_epoch(self, epoch: int) -> None:
        """Go to the views of an epoch, counted from 0; call it before each."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A batch at a time, as torch's DataLoader asks for it where this is defined."""
        part = self._joined
        request = part.request(self._rows[np.asarray(indices, np.int64)], self.epoch)
        (batch,) = loader(part.source, [request], augmentation=part.augmentation)
        inputs, labels, targets = part.training_batch(batch, self.epoch, CPU)
        if isinstance(labels, MixedLabels):
            labels = torch.where(labels.own == labels.partners, labels.own, -1)
        dense = to_dense(targets[self.temperature])
        return list(zip(inputs, labels, dense, strict=True))


def _source_of(dataset: Dataset[Any] | str | None, cache: Cache) -> Source:
    if dataset is None:
        return CacheSource(cache)
    if isinstance(dataset, str):
        return open_source(dataset)
    length = len(dataset)  # type: ignore[arg-type]  # map-style
    return DatasetSource(type(dataset).__name__, dataset, length)

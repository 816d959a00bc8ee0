"""The Python interface: dump, train, an open cache, and a Dataset with soft targets."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from softcache.cache import Cache, Header
from softcache.cache.reader import open_trainable
from softcache.cache.verify import check_damage
from softcache.data.loader import fetch_batch
from softcache.data.source import Source
from softcache.data.user_dataset import dataset_source
from softcache.errors import SettingsError
from softcache.files.local_copy import local_copy
from softcache.join.match import join
from softcache.join.samples import open_samples
from softcache.targets.decode import to_dense
from softcache.targets.fetch import soft_targets, stored_targets, tempered_targets
from softcache.token_data import row_items, token_lengths
from softcache.types import LabelSets, MixedLabels, StoredTargets, Targets, Views
from softcache.util.log import warn

if TYPE_CHECKING:
    from softcache.train.student import Student

CPU = torch.device("cpu")
Fetch = Callable[[Views, npt.NDArray[np.int64]], Mapping[float, StoredTargets]]


class SoftCache:
    """An open cache: its header, and its soft targets as tensors."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._fetch: dict[tuple[float, torch.device], Fetch] = {}  # by temperature and device

    @property
    def header(self) -> Header:
        """The cache's header: teacher, data, encoding and shape."""
        return self.cache.header

    @property
    def temperature(self) -> float:
        """The temperature of the stored soft targets."""
        return self.header.temperature

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.header.classes

    @property
    def views(self) -> int:
        """Number of views of each sample."""
        return self.header.views

    @property
    def content_id(self) -> str:
        """SHA-256 of the header and all digests, which identifies the content of the file."""
        return self.cache.content_id()

    def __len__(self) -> int:
        return self.header.samples

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.cache.path,)  # a memory map cannot be pickled

    def targets(
        self,
        rows: Sequence[int] | Tensor,
        *,
        view: int = 0,
        temperature: float | None = None,
        device: torch.device | str = CPU,
    ) -> Targets:
        """The teacher's log-probabilities for a batch of samples.

        Args:
            rows: (B,) rows of the cache, 0 to len - 1, in the order of the dumped data; where samples have
                many rows, numbers of these.
            view: 0 to views - 1.
            temperature: temperature of the softmax; by default that of the cache.
            device: device of the result.

        Returns:
            (B, C) float32 log softmax(z / temperature). For topk and sampled caches SparseTargets, which
            distillation_loss() takes directly and softcache.to_dense() converts.

        Raises:
            SettingsError: a row, the view or the temperature is out of range.
        """
        cache_rows = np.asarray(rows, np.int64).reshape(-1)
        for name, number, end in (
            ("row", int(cache_rows.max(initial=0)), self.header.row_count),
            ("row", int(cache_rows.min(initial=0)), self.header.row_count),
            ("view", view, self.views),
        ):
            if not 0 <= number < end:
                raise SettingsError(
                    f"{name} {number} of {self.cache.path}; expected 0 to {end - 1}"
                )
        temperature = self.temperature if temperature is None else float(temperature)
        if not 0 < temperature < np.inf:
            raise SettingsError(f"temperature is {temperature}; expected a number above 0")
        read_targets = soft_targets(self.cache, temperature, torch.device(device))
        return read_targets(np.asarray(view), cache_rows)

    def row_targets(
        self,
        cache_rows: Tensor,
        *,
        temperature: float | None = None,
        device: torch.device | str | None = None,
    ) -> StoredTargets:
        """The teacher's log-probabilities for tokens, words, frames or pixels.

        Args:
            cache_rows: int64 of any shape, as the items of a SoftLabelDataset have it; -1 for a position
                without soft targets.
            temperature: temperature of the softmax; by default that of the cache.
            device: device of the result; by default that of `cache_rows`.

        Returns:
            The targets (R, C) of the R entries that are not negative, in order: for
            distillation_loss(..., mask=cache_rows >= 0), which decodes a few rows at a time.
            softcache.to_dense() makes a tensor of them.

        Raises:
            SettingsError: a row or the temperature is out of range.
        """
        if cache_rows.is_floating_point() or cache_rows.dtype == torch.bool:
            raise SettingsError(
                f"cache_rows are {cache_rows.dtype}; expected whole numbers, as the items have them"
            )
        rows = cache_rows[cache_rows >= 0].cpu().numpy().astype(np.int64)
        temperature = self.temperature if temperature is None else float(temperature)
        total = self.header.views * self.header.row_count
        if rows.size and rows.max() >= total:
            raise SettingsError(f"row {rows.max()} of {self.cache.path}; expected 0 to {total - 1}")
        if not 0 < temperature < np.inf:
            raise SettingsError(f"temperature is {temperature}; expected a number above 0")
        key = temperature, cache_rows.device if device is None else torch.device(device)
        if key not in self._fetch:
            self._fetch[key] = stored_targets(self.cache, [temperature], key[1])
        return self._fetch[key](np.zeros(len(rows), np.int64), rows)[temperature]


def dump(
    *,
    teacher: str | Sequence[str],
    data: str,
    out: str | Path,
    **settings: Any,  # fields of DumpConfig
) -> SoftCache:
    """Write a teacher's soft targets for every sample to one file, like `softcache dump`.

    A dump that was stopped continues when the function is called again with the same arguments.

    Args:
        teacher: specification of the teacher, or of several teachers to average the probabilities of.
        data: specification of the samples.
        out: the file to write.
        settings: any other field of softcache.dump.config.DumpConfig, such as temperature=4.0.

    Returns:
        The finished cache.

    Raises:
        SoftcacheError: the settings, the data or the teacher are invalid.
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
    """Train students from a cache, like `softcache train`.

    Args:
        cache: one or more caches, as paths or URLs; None trains on labels alone.
        student: specification of the student, or of several students that share every batch.
        out: folder to write the run to.
        settings: any other field of softcache.train.config.TrainConfig or StudentConfig, such as
            data="folder:images", epochs=20, learning_rate=1e-3.

    Returns:
        The trained students, then their baselines: `final_model` is an nn.Module, and `evaluation` its
        test errors.

    Raises:
        SoftcacheError: the settings, the caches, the data or a student are invalid.
    """
    from softcache.train.loop import train as run_training
    from softcache.train.options import make_train_config

    caches = [cache] if isinstance(cache, str | Path) else list(cache or ())
    config = make_train_config(
        student=student, cache=[local_copy(path) for path in caches], out=Path(out), **settings
    )
    return run_training(config)


def open(path: str | Path, *, verify: bool = False) -> SoftCache:
    """Open a cache; only its header and digests are read.

    Args:
        path: file or URL; a URL is first pulled into the local cache folder.
        verify: also check every byte against its digest.

    Raises:
        FormatError: the file breaks a rule of the format, is damaged, or is unfinished without a complete
            view.
    """
    cache = open_trainable(local_copy(path))
    if verify:
        check_damage(cache)
    return SoftCache(cache)


class SoftLabelDataset(Dataset[Any]):
    """The samples of a data set, each with the soft targets of exactly the pixels it returns.

    An item is a tuple (input, label, log-probabilities):

    - the input, float, as the teacher saw it in this epoch's view;
    - the label, int64; -1 if the sample is unlabelled or mixed with a sample of another label; with
      --targets sigmoid (C,) float32, 1 where a class applies, and all -1 if the sample is unlabelled;
    - (C,) float32 log softmax(z / temperature).

    Where samples have many rows, an item is a dict of

    - `input_ids` (L,) int64, the tokens of a document, or `inputs` (*shape) of anything else;
    - `row_labels` (P,) int64, the label of each of the P positions, -100 where there is none. That of a
      language model is the next token: unlike the `labels` of transformers, these are shifted already, so a
      model must not get them as its labels, which it would shift again;
    - `cache_rows` (P,) int64, the row of the cache that each position has, or -1: for a batch of these,
      SoftCache.row_targets() fetches the soft targets, which would be large for whole documents.

    collate_tokens() pads documents to a batch, PackedTokens packs them into blocks. Pixels are in reading
    order: logits (B, C, H, W) become (B, P, C) by `logits.flatten(2).mT`.

    Samples are matched to the cache by content, once, at construction. Item i is sample i of the data
    set; for the cache of a shard, it is sample i of the shard in the order of the data set.

    The epoch chooses the views: set_epoch() says which it is, or a ViewSampler sends it with every index.
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
            dataset: the map-style Dataset or the specification that the cache was dumped from; None uses
                the samples embedded in the cache.
            cache: an open cache, or its path or URL.
            temperature: temperature of the soft targets; by default that of the cache.
            augment: the cache's own augmentation, needed only if it is a callable.
            rotate: mix all views within each epoch; otherwise an epoch is a single view of all samples.

        Raises:
            DataError: the samples are not those of the cache; the message names the first that differs.
            SettingsError: the temperature or the augmentation does not fit the cache.
        """
        self.cache = cache if isinstance(cache, SoftCache) else open(cache)
        self.temperature = self.cache.temperature if temperature is None else float(temperature)
        if not 0 < self.temperature < np.inf:
            raise SettingsError(f"temperature is {self.temperature}; expected a number above 0")
        # in shared memory, so that worker processes that live on see every change: the epoch, and the items
        # that were asked for in it without a ViewSampler, and whether there was a warning about that
        self._progress = torch.zeros(3, dtype=torch.int64)
        self._progress.share_memory_()  # type: ignore[no-untyped-call]
        self._joined = join(
            _source_of(dataset, self.cache.cache),
            self.cache.cache,
            augment=augment,
            temperatures=[self.temperature],
            device=CPU,
            rotate=rotate,
        )
        if self._joined.layout is not None:  # SoftCache.row_targets() fetches them
            self._joined = dataclasses.replace(self._joined, targets=None)
        self._cache_rows = np.argsort(self._joined.source_indices)  # by item

    def __len__(self) -> int:
        return len(self._joined)

    def __getstate__(self) -> dict[str, Any]:
        # the function that fetches targets reads a memory map, and cannot be sent to another process
        return self.__dict__ | {"_joined": dataclasses.replace(self._joined, targets=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._joined.layout is None:
            targets = tempered_targets(self.cache.cache, [self.temperature], CPU)
            self._joined = dataclasses.replace(self._joined, targets=targets)

    @property
    def unit(self) -> str | None:
        """What a sample has many rows of: `token`, `word`, `frame` or `pixel`; None if it has one row."""
        return None if self._joined.layout is None else self.cache.header.unit

    @property
    def epoch(self) -> int:
        """The epoch that set_epoch() set last."""
        return int(self._progress[0])

    def set_epoch(self, epoch: int) -> None:
        """Switch to the views of an epoch, counted from 0; call it before every epoch.

        It reaches worker processes that are running. A ViewSampler makes it unnecessary.
        """
        self._progress[0], self._progress[1] = operator.index(epoch), 0

    def __getitem__(self, index: int | tuple[int, int]) -> Any:  # noqa: ANN401  # a tuple or a dict
        return self.__getitems__([index])[0]

    def token_lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each document, (N,).

        Raises:
            SettingsError: the samples are no documents.
        """
        return token_lengths(self._joined, self._cache_rows)

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[Any]:
        """A whole batch; torch's DataLoader calls this instead of `__getitem__`.

        Args:
            indices: items, or pairs (epoch, item) as a ViewSampler yields them.
        """
        if isinstance(indices[0], tuple):
            pairs: Any = indices
            epochs = {int(epoch) for epoch, _ in pairs}
            items = [int(item) for _, item in pairs]
            if len(epochs) > 1:  # no sampler mixes epochs in a batch
                return [self.__getitems__([pair])[0] for pair in pairs]
            (epoch,) = epochs
        else:
            epoch, items = self.epoch, [int(item) for item in indices]  # type: ignore[arg-type]
            self._count(len(items))
        joined = self._joined
        request = joined.request(self._cache_rows[np.asarray(items, np.int64)], epoch)
        batch = fetch_batch(joined.source, request, joined.augmentation)
        if joined.layout is not None:
            ids, header = batch.sample_ids.numpy(), self.cache.header
            views = np.broadcast_to(joined.views(epoch, ids), len(ids)) - header.first_view
            return row_items(joined, joined.training_batch(batch, epoch, CPU), views, ids)
        inputs, labels, targets, _ = joined.training_batch(batch, epoch, CPU)
        if isinstance(labels, MixedLabels):
            labels = torch.where(labels.own == labels.partners, labels.own, -1)
        if isinstance(labels, LabelSets):
            labels = labels.applies.masked_fill(~labels.known[:, None], -1)
        dense = to_dense(targets[self.temperature])
        return list(zip(inputs, labels, dense, strict=True))

    def _count(self, items: int) -> None:
        """Warn once where a second pass over the data has begun, and the epoch is still the same."""
        self._progress[1] += items
        # well beyond one pass: a few items may have been looked at before
        if self._progress[1] > 1.5 * len(self) and self.cache.views > 1 and not self._progress[2]:
            self._progress[2] = 1
            warn(
                f"a second pass over {self.cache.cache.path} has begun in epoch {self.epoch}, so it has the "
                f"same one of {self.cache.views} views of each sample: give the DataLoader "
                "sampler=softcache.ViewSampler(dataset), or call set_epoch() before each epoch"
            )


class ViewSampler(Sampler[tuple[int, int]]):
    """The items of a SoftLabelDataset in random order, each with the epoch, which chooses its view.

    Every new pass over it is the next epoch, unless set_epoch() says which it is. Lightning and accelerate
    call that; a DataLoader with workers that live on needs nothing else.
    """

    def __init__(self, dataset: SoftLabelDataset, *, shuffle: bool = True, seed: int = 0) -> None:
        """Sample all items once an epoch.

        Args:
            shuffle: in an order that depends on (seed, epoch) alone; otherwise in that of the data set.

        Raises:
            SettingsError: `dataset` is something else, such as a Subset.
        """
        if not isinstance(dataset, SoftLabelDataset):
            raise SettingsError(
                f"a ViewSampler of {type(dataset).__name__}; expected a SoftLabelDataset: for a part of "
                "one, make a SoftLabelDataset of that part of the data"
            )
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.epoch = 0  # of the next pass

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        order = np.arange(len(self))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return iter([(epoch, int(item)) for item in order])


def _source_of(dataset: Dataset[Any] | str | None, cache: Cache) -> Source:
    if dataset is None or isinstance(dataset, str):
        return open_samples(cache, dataset)
    return dataset_source(type(dataset).__name__, dataset)

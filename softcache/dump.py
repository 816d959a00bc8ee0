"""Stage 1: samples become a file. The teacher runs once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache import choose, fidelity
from softcache.cache import Cache, Dense, Header, Sampled, open_cache
from softcache.cache.encodings import MAX_TEMPERATURE
from softcache.cache.merge import copy_view
from softcache.cache.reader import partial_path
from softcache.cache.summary import rows_to_look_at, summarize
from softcache.cache.writer import Stored, Writer, create
from softcache.data import Source, check_labels, open_source, to_float
from softcache.errors import Interrupted, SettingsError, SoftcacheError
from softcache.evaluate import data_digest, evaluate
from softcache.loader import augmented, loader, make_request, sequential_batches
from softcache.progress import progress
from softcache.replay import check_replay, fingerprinted_rows, software, steady_fingerprints
from softcache.resume import check_same
from softcache.targets import make_encoder, shared_tensors
from softcache.teacher import PRECISIONS, Ensemble, load_teacher, make_ensemble
from softcache.views import Augmentation, parse_augment, public_spec


@dataclass(frozen=True)
class DumpConfig:
    """Everything that decides what `dump` does."""

    teacher: str | Sequence[str]
    data: str
    temperature: float
    out: Path
    weights: Path | Sequence[Path] | None = None
    teacher_weight: Sequence[float] = ()
    eval_data: str | None = None
    views: int = 1
    first_view: int = 0
    shard: tuple[int, int] = (0, 1)  # which part of the samples, of how many
    augment: str | None = None
    seed: int = 0
    encoding: str = "dense"
    like: Path | None = None  # a cache whose encoding, and what it was fitted to, is taken
    max_kl: float = choose.DEFAULT_MAX_KL
    classes: int | None = None
    batch_size: int = 256
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise SettingsError(
                f"temperature is {self.temperature}; expected a number above 0, up to 1e6"
            )
        if self.classes is not None and self.classes < 2:
            raise SettingsError(f"classes is {self.classes}; expected 2 or more")
        if self.seed >= 1 << 63:
            raise SettingsError(f"seed is {self.seed}; expected less than 2^63")
        if not 0 < self.max_kl < math.inf:
            raise SettingsError(f"max-kl is {self.max_kl}; expected a number above 0")
        for name, low in (
            ("views", 1),
            ("first_view", 0),
            ("seed", 0),
            ("batch_size", 1),
            ("workers", 0),
        ):
            if getattr(self, name) < low:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected {low} or more")
        if self.precision not in PRECISIONS:
            raise SettingsError(
                f"precision {self.precision!r} is unknown; expected {', '.join(PRECISIONS)}"
            )
        if not 0 <= self.shard[0] < self.shard[1]:
            raise SettingsError(
                f"shard is {self.shard[0]}/{self.shard[1]}; expected i/n with i from 0 to n - 1"
            )
        if self.views + self.first_view > 1 and not self.augment:
            raise SettingsError(
                f"{self.views} views without --augment would all be the same; add it, or ask for one"
            )
        teachers, weights = self.teachers_and_weights
        if weights and len(weights) != len(teachers):
            raise SettingsError(
                f"{len(weights)} --weights for {len(teachers)} --teacher; expected one for each, in "
                "the same order, or none"
            )

    @property
    def teachers_and_weights(self) -> tuple[list[str], list[Path]]:
        teachers = [self.teacher] if isinstance(self.teacher, str) else list(self.teacher)
        weights = [self.weights] if isinstance(self.weights, Path) else list(self.weights or ())
        return teachers, weights


def dump(config: DumpConfig) -> Cache:
    """Write the teacher's soft targets for every sample of the data into `config.out`.

    Run again after any stop, it goes on where it stopped. Asked for more views than a finished
    cache has, it copies those into a new file and adds the others; the old file stays until then.

    Raises:
        SoftcacheError: the settings, the data or the teacher are not as they should be, or the
            disk fails; what was done is kept.
    """
    source = open_source(config.data)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    teacher = load_teachers(config, source, augmentation)
    draft = draft_header(config, source, teacher)
    check_out(config.out)
    finished = None
    if config.out.exists() and not config.overwrite:
        finished = open_cache(config.out)
        check_same(finished, draft, source, config.eval_data, but=["views"])
        if finished.header.views >= draft.views:
            check_same(finished, draft, source, config.eval_data)
            print(f"{config.out} is complete already; left alone (--overwrite makes it anew)")
            return finished
        every = np.arange(len(source))
        own = every[draft.first_sample : draft.first_sample + draft.samples]
        check_replay(finished, source, augmentation, own, every)
        print(f"adding views to {config.out}, which has {finished.header.views} of {draft.views}")
    try:
        begin(config, draft, source, teacher, augmentation, finished)
        with Writer(config.out) as writer:
            if finished is not None:
                copy(finished, writer)
            fill(writer, config, source, teacher, augmentation)
            with progress("summary", rows_to_look_at(writer.cache), "rows") as advance:
                summary = summarize(writer.cache, advance)
            summary["fidelity"] = fidelity.measure(
                writer.cache, source, teacher, augmentation, workers=config.workers
            )
            writer.finish(summary)
    except KeyboardInterrupt:
        partial = partial_path(config.out)
        kept = f"{partial} keeps what was done: the same command goes on"
        raise Interrupted(f"stopped; {kept if partial.exists() else 'nothing was begun'}") from None
    cache = open_cache(config.out)
    if cache.header.summary and "fidelity" in cache.header.summary:
        sampled = isinstance(cache.header.encoding, Sampled)
        print(fidelity.describe(cache.header.summary["fidelity"], sampled))
    return cache


def copy(finished: Cache, writer: Writer) -> None:
    """Copy the views of a finished cache into a file that is to hold more of them."""
    header = finished.header
    with progress("copy", header.samples * header.views, "rows") as advance:
        for view in range(header.views):
            copy_view(finished, writer, view, advance)
        writer.commit()


def fill(
    writer: Writer,
    config: DumpConfig,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
) -> None:
    """The dump loop: every batch in which a sample is missing, view by view.

    The grid of batches is the same after a resume, so that each row is computed in the same
    company, and the file comes out the same to the byte.
    """
    header = writer.header
    encode = make_encoder(
        header.encoding,
        shared_tensors(writer.cache),
        temperature=header.temperature,
        seed=header.seed,
        device=teacher.device,
    )
    grid = sequential_batches(header.samples, config.batch_size)
    missing = [writer.missing(view) for view in range(header.views)]
    total = header.samples * header.views
    with progress("dump", total, "rows", done=total - sum(map(np.sum, missing))) as advance:
        for view in range(header.views):
            batches = [batch for batch in grid if missing[view][batch.start : batch.stop].any()]
            drawn = header.first_view + view
            requests = [
                make_request(augmentation, samples.tolist(), drawn, samples)
                for samples in (header.first_sample + np.arange(b.start, b.stop) for b in batches)
            ]
            for batch in loader(
                source, requests, augmentation=augmentation, workers=config.workers, keys=True
            ):
                labels, samples = batch.labels.numpy(), batch.indices.numpy()
                check_labels(labels, samples, header.classes, source)
                inputs = augmented(batch, augmentation, drawn, samples, teacher.device)
                log_probs = teacher.log_probs(inputs, header.temperature, samples)
                stored = encode(log_probs, drawn, samples)
                keys = batch.keys.numpy().view(np.uint64)
                rows = samples - header.first_sample
                writer.write(view, int(rows[0]), stored, {"labels": labels, "keys": keys})
                advance(int(missing[view][rows].sum()))


def load_teachers(config: DumpConfig, source: Source, augmentation: Augmentation) -> Ensemble:
    """Every teacher of the dump, loaded and tried on the first sample."""
    device = pick_device(config.device)
    raw = source.fetch([0])[0]
    first = to_float(augmentation.transformed(raw, config.first_view, np.zeros(1, np.int64)))
    specs, files = config.teachers_and_weights
    weights: Sequence[Path | None] = files or [None] * len(specs)
    classes = config.classes or len(source.class_names) or None
    loaded = [
        load_teacher(
            spec,
            path,
            sample=first,
            classes=classes,
            device=device,
            precision=config.precision,
        )
        for spec, path in zip(specs, weights, strict=True)
    ]
    return make_ensemble(loaded, config.teacher_weight)


def begin(
    config: DumpConfig,
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
    finished: Cache | None = None,
) -> None:
    """Allocate the unfinished file, or check that the one that is there was begun like this.

    Args:
        finished: the same with fewer views, whose encoding and evaluation are taken over.
    """
    partial = partial_path(config.out)
    if partial.exists():
        try:
            check_same(open_cache(partial, unfinished=True), draft, source, config.eval_data)
            print(f"going on with {partial}")
            return
        except SoftcacheError:
            if not config.overwrite:
                raise
            partial.unlink()
    like = finished or (open_cache(config.like) if config.like else None)
    if like is not None:
        header, arrays = take_encoding(draft, like)
    else:
        header, arrays = choose_encoding(config, draft, source, teacher, augmentation)
    known = finished.header.evaluation if finished else None
    evaluation = known or evaluate_teacher(config.eval_data, teacher, config.workers)
    names = source.class_names or tuple(str(label) for label in range(teacher.classes))
    arrays["class_names"] = np.array([name.encode() for name in names])
    arrays["fingerprinted"] = chosen = fingerprinted_rows(draft.samples)
    arrays["fingerprints"] = steady_fingerprints(
        source,
        augmentation,
        range(draft.first_view, draft.first_view + draft.views),
        draft.first_sample + chosen,
    )
    create(config.out, replace(header, evaluation=evaluation), arrays)


def choose_encoding(
    config: DumpConfig,
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
) -> tuple[Header, Stored]:
    """The header with the encoding that was asked for, fitted or measured, and its arrays."""
    rows = None
    if choose.needs_rows(config.encoding):
        rows = choose.try_rows(draft, source, teacher, augmentation, config.workers)
    encoding, shared, candidates = choose.resolve(
        config.encoding,
        rows,
        temperature=draft.temperature,
        seed=draft.seed,
        max_kl=config.max_kl,
    )
    if candidates:
        print(choose.table(candidates, encoding))
    choice = (draft.choice or {}) | {"candidates": [c.to_json() for c in candidates]}
    arrays = {name: tensor.numpy() for name, tensor in shared.items()}
    return replace(draft, encoding=encoding, choice=choice), arrays


def take_encoding(draft: Header, like: Cache) -> tuple[Header, Stored]:
    """The header with the encoding of another cache, and the arrays that it was fitted to.

    Raises:
        SettingsError: that cache is of other classes or of another temperature.
    """
    for name in ("classes", "temperature"):
        theirs, mine = getattr(like.header, name), getattr(draft, name)
        if theirs != mine:
            raise SettingsError(f"--like {like.path} has {name} {theirs}; this dump has {mine}")
    shared = [array.name for array in like.header.arrays if array.axis == "shared"]
    arrays = {name: np.array(like.arrays[name]) for name in shared}
    return replace(draft, encoding=like.header.encoding, choice=like.header.choice), arrays


def evaluate_teacher(spec: str | None, teacher: Ensemble, workers: int) -> dict[str, Any] | None:
    """The teacher's own errors, for the header."""
    if spec is None:
        return None
    source = open_source(spec)
    found = evaluate(
        lambda inputs: teacher.log_probs(inputs, 1.0),
        source,
        teacher.classes,
        teacher.device,
        workers,
    )
    print(
        f"teacher: {found.errors:,} errors of {found.samples:,} on {source.name} "
        f"({found.accuracy:.2%})"
    )
    return {
        "data": source.name,
        "digest": data_digest(source, workers),
        "errors": found.errors,
        "samples": found.samples,
    }


def draft_header(config: DumpConfig, source: Source, teacher: Ensemble) -> Header:
    """The header but for encoding and layout, which creating the file decides."""
    choose.check_spec(config.encoding, config.temperature, teacher.classes)
    total, (shard, shards) = len(source), config.shard
    if shards > total:
        raise SettingsError(f"{shards} shards of {total:,} samples; expected at most one for each")
    first, end = (part * total // shards for part in (shard, shard + 1))
    return Header(
        views=config.views,
        samples=end - first,
        first_view=config.first_view,
        first_sample=first,
        data_samples=total,
        positions=(),
        classes=teacher.classes,
        temperature=float(config.temperature),
        encoding=Dense(),
        seed=config.seed,
        augment=public_spec(config.augment),
        precision=config.precision,
        data=source.name,
        choice=open_cache(config.like).header.choice
        if config.like
        else {"asked": config.encoding}
        | ({"max_kl": config.max_kl} if config.encoding == "auto" else {}),
        teachers=teacher.provenance,
        evaluation=None,
        software=software(),
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
    )


def check_out(out: Path) -> None:
    """Raise SettingsError now, not after hours, if a cache cannot get the name `out`."""
    if out.is_dir():
        raise SettingsError(
            f"--out {out} is a folder; name a file in it, such as {out / 'cache.h5'}"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--out {out}: cannot make its folder ({error.strerror}); give another --out"
        ) from error


def pick_device(name: str) -> torch.device:
    """The device asked for; `auto` takes a GPU if there is one.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device {name}: torch cannot use it here ({' '.join(str(error).split())[:200]}); "
            "use --device auto or cpu"
        ) from error
    return device

"""Stage 1: samples become a file. The teacher runs once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcache import __version__
from softcache.cache import Cache, Header, open_cache, parse_encoding
from softcache.cache.reader import partial_path
from softcache.cache.writer import Writer, create
from softcache.data import (
    Source,
    check_labels,
    loader,
    open_source,
    sequential_batches,
    to_float,
)
from softcache.errors import Interrupted, SettingsError
from softcache.evaluate import data_digest, evaluate
from softcache.progress import progress
from softcache.targets import encode, soften
from softcache.teacher import PRECISIONS, Teacher, load_teacher
from softcache.views import augment, parse_augment

SUMMARY_VALUES = 1 << 27  # how many probabilities the summary looks at, at the most
RESUME_SAMPLES = 256  # how many samples a resumed dump compares with those it began with
# what decides the values of a cache: a dump goes on only with the same
SETTINGS = (
    "data", "samples", "classes", "teachers", "temperature", "precision", "encoding", "views",
    "augment", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class DumpConfig:
    """Everything that decides what `dump` does."""

    teacher: str
    data: str
    temperature: float
    out: Path
    weights: Path | None = None
    eval_data: str | None = None
    views: int = 1
    augment: str | None = None
    seed: int = 0
    encoding: str = "dense"
    classes: int | None = None
    batch_size: int = 256
    device: str = "auto"
    precision: str = "fp32"
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise SettingsError(f"temperature is {self.temperature}; expected a number above 0")
        for name, low in (("views", 1), ("seed", 0), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < low:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected {low} or more")
        if self.precision not in PRECISIONS:
            raise SettingsError(
                f"precision {self.precision!r} is unknown; expected {', '.join(PRECISIONS)}"
            )
        if self.views > 1 and not self.augment:
            raise SettingsError(
                f"{self.views} views without --augment would all be the same; add it, or ask for one"
            )


def dump(config: DumpConfig) -> Cache:
    """Write the teacher's soft targets for every sample of the data into `config.out`.

    Run again after any stop, it goes on where it stopped.

    Raises:
        SoftcacheError: the settings, the data or the teacher are not as they should be, or the
            disk fails; what was done is kept.
    """
    source = open_source(config.data)
    device = pick_device(config.device)
    first = to_float(source.fetch([0])[0])
    teacher = load_teacher(
        config.teacher,
        config.weights,
        sample=first,
        classes=config.classes or len(source.class_names) or None,
        device=device,
        precision=config.precision,
    )
    draft = draft_header(config, source, teacher)
    if config.out.exists() and not config.overwrite:
        finished = open_cache(config.out)
        check_same(finished, draft, source, config)
        print(f"{config.out} is complete already; left alone (--overwrite makes it anew)")
        return finished
    begin(config, draft, source, teacher)
    try:
        with Writer(config.out) as writer:
            fill(writer, config, source, teacher)
            writer.finish(summarize(writer.cache))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {partial_path(config.out)} keeps what was done: the same command goes on"
        ) from None
    return open_cache(config.out)


def fill(writer: Writer, config: DumpConfig, source: Source, teacher: Teacher) -> None:
    """The dump loop: every batch in which a sample is missing, view by view.

    The grid of batches is the same after a resume, so that each row is computed in the same
    company, and the file comes out the same to the byte.
    """
    header = writer.header
    ops = parse_augment(header.augment)
    grid = sequential_batches(header.samples, config.batch_size)
    missing = [writer.missing(view) for view in range(header.views)]
    total = header.samples * header.views
    with progress("dump", total, "rows", done=total - sum(map(np.sum, missing))) as advance:
        for view in range(header.views):
            batches = [batch for batch in grid if missing[view][batch.start : batch.stop].any()]
            for batch in loader(source, batches, workers=config.workers, keys=True):
                labels, samples = batch.labels.numpy(), batch.indices.numpy()
                check_labels(labels, samples, header.classes, source)
                inputs = to_float(batch.inputs.to(teacher.device))
                inputs = augment(inputs, ops, seed=header.seed, view=view, samples=samples)
                logits = teacher.logits(inputs, first_sample=int(samples[0]))
                rows = encode(header.encoding, soften(logits, header.temperature))
                keys = batch.keys.numpy().view(np.uint64)
                writer.write(view, int(samples[0]), rows, {"labels": labels, "keys": keys})
                advance(int(missing[view][samples].sum()))


def begin(config: DumpConfig, draft: Header, source: Source, teacher: Teacher) -> None:
    """Allocate the unfinished file, or check that the one that is there was begun like this."""
    partial = partial_path(config.out)
    if config.overwrite:
        partial.unlink(missing_ok=True)
    if partial.exists():
        check_same(open_cache(partial, unfinished=True), draft, source, config)
        print(f"going on with {partial}")
        return
    config.out.parent.mkdir(parents=True, exist_ok=True)
    evaluation = None
    if config.eval_data:
        eval_source = open_source(config.eval_data)
        found = evaluate(teacher.logits, eval_source, teacher.device, config.workers)
        print(
            f"teacher: {found.errors:,} errors of {found.samples:,} on {eval_source.name} "
            f"({found.accuracy:.2%})"
        )
        evaluation = {
            "data": eval_source.name,
            "digest": data_digest(eval_source, config.workers),
            "errors": found.errors,
            "samples": found.samples,
        }
    names = source.class_names or tuple(str(label) for label in range(teacher.classes))
    shared = {"class_names": np.array([name.encode() for name in names])}
    create(config.out, replace(draft, evaluation=evaluation), shared)


def draft_header(config: DumpConfig, source: Source, teacher: Teacher) -> Header:
    """The header but for the layout, which creating the file decides."""
    parse_augment(config.augment)
    return Header(
        views=config.views,
        samples=len(source),
        positions=(),
        classes=teacher.classes,
        temperature=float(config.temperature),
        encoding=parse_encoding(config.encoding),
        seed=config.seed,
        augment=config.augment,
        precision=config.precision,
        data=source.name,
        teachers=(teacher.provenance,),
        evaluation=None,
        software={
            "softcache": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        block_rows=1,
        user_block=0,
        file_bytes=0,
        hdf5_digest="",
        shared_digest="",
        arrays=(),
    )


def check_same(cache: Cache, draft: Header, source: Source, config: DumpConfig) -> None:
    """Raise SettingsError unless `cache` was begun with the settings and the data of this dump."""
    advice = "use the same, give another --out, or --overwrite to start again"
    for name in SETTINGS:
        begun, wanted = getattr(cache.header, name), getattr(draft, name)
        if begun != wanted:
            raise SettingsError(
                f"{cache.path} was begun with {_difference(name, begun, wanted)}; {advice}"
            )
    committed = np.repeat(cache.arrays["sample_digests"] != 0, cache.header.block_rows)
    present = np.flatnonzero(committed[: cache.header.samples])
    spread = np.unique(np.linspace(0, len(present) - 1, RESUME_SAMPLES).astype(np.int64))
    at = present[spread] if len(present) else present
    for batch in loader(source, [at.tolist()] if len(at) else [], keys=True):
        same = batch.keys.numpy().view(np.uint64) == cache.keys[at]
        same &= batch.labels.numpy() == cache.labels[at]
        if not same.all():
            first = int(at[int(np.flatnonzero(~same)[0])])
            raise SettingsError(
                f"{cache.path} was begun with other data: sample {first} of {source.name} differs; "
                f"{advice}"
            )


def summarize(cache: Cache) -> dict[str, Any]:
    """What the header says of the soft targets, over rows spread evenly through views and samples.

    entropy: the mean in nats, at the cache's temperature. agreement: the share of labelled rows
    whose top class is the label, None without labels. rows: how many rows were looked at.
    """
    header = cache.header
    total = header.views * header.samples
    count = max(1, min(total, SUMMARY_VALUES // header.classes))
    rows = (np.arange(count) * (total / count)).astype(np.int64)
    entropy = agreed = labelled = 0.0
    chunk = max(1, (1 << 22) // header.classes)
    with progress("summary", count, "rows") as advance:
        for start in range(0, count, chunk):
            view, sample = np.divmod(rows[start : start + chunk], header.samples)
            for one in np.unique(view):
                samples = sample[view == one]
                log_probs = cache.rows(int(one), samples).astype(np.float64)  # (B, C)
                labels = cache.labels[samples]
                entropy -= float((np.exp(log_probs) * log_probs).sum())
                agreed += int((log_probs.argmax(-1) == labels).sum())
                labelled += int((labels >= 0).sum())
            advance(len(view))
    return {
        "entropy": entropy / count,
        "agreement": agreed / labelled if labelled else None,
        "rows": count,
    }


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


def _difference(name: str, begun: object, wanted: object) -> str:
    if name == "encoding":
        begun, wanted = (encoding.to_json() for encoding in (begun, wanted))  # type: ignore[attr-defined]
    if name == "teachers":
        changed = [
            f"{key} {old[key]!r}, now {new[key]!r}"
            for old, new in zip(begun, wanted, strict=True)  # type: ignore[call-overload]
            for key in new
            if old.get(key) != new[key]
        ]
        return f"another teacher ({'; '.join(changed)})"
    return f"{name} {begun!r}, now it is {wanted!r}"

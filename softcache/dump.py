"""Stage 1: samples become a file. The teacher runs once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache import choose, fidelity
from softcache.cache import Cache, Dense, Header, Sampled, open_cache
from softcache.cache.encodings import MAX_TEMPERATURE
from softcache.cache.reader import partial_path
from softcache.cache.writer import Writer, create
from softcache.data import Source, check_labels, open_source, to_float
from softcache.errors import Interrupted, SettingsError, SoftcacheError
from softcache.evaluate import data_digest, evaluate
from softcache.loader import augmented, loader, make_request, sequential_batches
from softcache.progress import progress
from softcache.replay import fingerprinted_rows, software, steady_fingerprints
from softcache.targets import make_encoder, shared_tensors
from softcache.teacher import PRECISIONS, Ensemble, load_teacher, make_ensemble
from softcache.views import Augmentation, parse_augment, public_spec

SUMMARY_VALUES = 1 << 27  # how many probabilities the summary looks at, at the most
RESUME_SAMPLES = 256  # how many samples a resumed dump compares with those it began with
# what decides the values of a cache: a dump goes on only with the same
SETTINGS = (
    "data", "samples", "classes", "teachers", "temperature", "precision", "choice", "views",
    "augment", "seed",
)  # fmt: skip


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
    augment: str | None = None
    seed: int = 0
    encoding: str = "dense"
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

    Run again after any stop, it goes on where it stopped.

    Raises:
        SoftcacheError: the settings, the data or the teacher are not as they should be, or the
            disk fails; what was done is kept.
    """
    source = open_source(config.data)
    teacher = load_teachers(config, source)
    draft = draft_header(config, source, teacher)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    check_out(config.out)
    if config.out.exists() and not config.overwrite:
        finished = open_cache(config.out)
        check_same(finished, draft, source, config)
        print(f"{config.out} is complete already; left alone (--overwrite makes it anew)")
        return finished
    try:
        begin(config, draft, source, teacher, augmentation)
        with Writer(config.out) as writer:
            fill(writer, config, source, teacher, augmentation)
            summary = summarize(writer.cache)
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
            requests = [
                make_request(augmentation, b, view, np.arange(b.start, b.stop)) for b in batches
            ]
            for batch in loader(
                source, requests, augmentation=augmentation, workers=config.workers, keys=True
            ):
                labels, samples = batch.labels.numpy(), batch.indices.numpy()
                check_labels(labels, samples, header.classes, source)
                inputs = augmented(batch, augmentation, view, samples, teacher.device)
                log_probs = teacher.log_probs(inputs, header.temperature, samples)
                rows = encode(log_probs, view, samples)
                keys = batch.keys.numpy().view(np.uint64)
                writer.write(view, int(samples[0]), rows, {"labels": labels, "keys": keys})
                advance(int(missing[view][samples].sum()))


def load_teachers(config: DumpConfig, source: Source) -> Ensemble:
    """Every teacher of the dump, loaded and tried on the first sample."""
    device = pick_device(config.device)
    first = to_float(source.fetch([0])[0])
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


def dry_run(config: DumpConfig) -> str:
    """What a dump would take: bytes on disk, time by a few batches, candidates; writes nothing."""
    source = open_source(config.data)
    teacher = load_teachers(config, source)
    draft = draft_header(config, source, teacher)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    try_rows(draft, source, teacher, augmentation, config.workers, most=256)  # warms up
    before = time.perf_counter()
    again = try_rows(draft, source, teacher, augmentation, config.workers)
    rate = len(again) / (time.perf_counter() - before)
    found = choose.candidates(again, temperature=draft.temperature, seed=draft.seed)
    encoding, shared, listed = choose.resolve(
        config.encoding,
        again,
        temperature=draft.temperature,
        seed=draft.seed,
        max_kl=config.max_kl,
    )
    if encoding not in [candidate.encoding for candidate in found]:
        asked = listed or [
            choose.measure(config.encoding, encoding, again, draft.temperature, draft.seed)
        ]
        found = sorted([*asked, *found], key=lambda candidate: candidate.bytes_per_row)
    rows = draft.samples * draft.views
    common = sum(tensor.numel() * tensor.element_size() for tensor in shared.values())
    row_bytes = sum(
        np.dtype(array.dtype).itemsize * math.prod(array.shape)
        for array in encoding.arrays(draft.classes)
        if array.axis == "rows"
    )
    size = rows * row_bytes + draft.samples * 16 + common
    return (
        f"{choose.table(found, encoding)}\n\n"
        f"{draft.samples:,} samples x {draft.views:,} view(s) as {choose.spec_of(encoding)}: "
        f"about {size:,} bytes; about {rows / rate:,.0f} s at {rate:,.0f} rows/s here. "
        "Nothing was written."
    )


def try_rows(
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
    workers: int,
    most: int = choose.ROWS,
) -> Tensor:
    """Rows of the teacher (n, C), drawn from the whole data with the cache's seed."""
    count = max(2, min(most, fidelity.VALUES // draft.classes))
    return fidelity.teacher_rows(
        teacher,
        source,
        fidelity.draw_rows(draft.views, draft.samples, count, draft.seed),
        temperature=draft.temperature,
        augmentation=augmentation,
        workers=workers,
    )


def begin(
    config: DumpConfig,
    draft: Header,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
) -> None:
    """Allocate the unfinished file, or check that the one that is there was begun like this."""
    partial = partial_path(config.out)
    if partial.exists():
        try:
            check_same(open_cache(partial, unfinished=True), draft, source, config)
            print(f"going on with {partial}")
            return
        except SoftcacheError:
            if not config.overwrite:
                raise
            partial.unlink()
    evaluation = evaluate_teacher(config.eval_data, teacher, config.workers)
    rows = None
    if choose.needs_rows(config.encoding):
        rows = try_rows(draft, source, teacher, augmentation, config.workers)
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
    header = replace(draft, evaluation=evaluation, encoding=encoding, choice=choice)
    names = source.class_names or tuple(str(label) for label in range(teacher.classes))
    arrays = {name: tensor.numpy() for name, tensor in shared.items()}
    arrays["class_names"] = np.array([name.encode() for name in names])
    arrays["fingerprinted"] = chosen = fingerprinted_rows(draft.samples)
    arrays["fingerprints"] = steady_fingerprints(source, augmentation, draft.views, chosen)
    create(config.out, header, arrays)


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
    return Header(
        views=config.views,
        samples=len(source),
        first_view=0,
        first_sample=0,
        positions=(),
        classes=teacher.classes,
        temperature=float(config.temperature),
        encoding=Dense(),
        seed=config.seed,
        augment=public_spec(config.augment),
        precision=config.precision,
        data=source.name,
        choice={"asked": config.encoding}
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


def check_same(cache: Cache, draft: Header, source: Source, config: DumpConfig) -> None:
    """Raise SettingsError unless `cache` was begun with the settings and the data of this dump."""
    advice = "use the same, give another --out, or --overwrite to start again"
    if config.eval_data:
        begun = (cache.header.evaluation or {}).get("data")
        wanted = open_source(config.eval_data).name
        if begun != wanted:
            raise SettingsError(
                f"{cache.path} was begun with evaluation data {begun or 'none'}, now they are {wanted}; "
                f"{advice}"
            )
    for name in SETTINGS:
        begun, wanted = getattr(cache.header, name), getattr(draft, name)
        if name == "choice":
            name, begun, wanted = "encoding", _asked(begun), _asked(wanted)
        if begun != wanted:
            raise SettingsError(
                f"{cache.path} was begun with {_difference(name, begun, wanted)}; {advice}"
            )
    intact = [
        cache.sample_digest(block) == digest
        for block, digest in enumerate(cache.arrays["sample_digests"])
    ]
    present = np.flatnonzero(np.repeat(intact, cache.header.block_rows)[: cache.header.samples])
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


def _asked(choice: dict[str, Any] | None) -> str:
    """The encoding as it was asked for."""
    asked = choice or {}
    limit = f" --max-kl {asked['max_kl']:g}" if "max_kl" in asked else ""
    return f"{asked.get('asked')}{limit}"


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
                probs = np.exp(log_probs)
                entropy -= float((probs * np.where(probs > 0, log_probs, 0)).sum())
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
    if name == "teachers" and len(begun) != len(wanted):  # type: ignore[arg-type]
        return f"{len(begun)} teachers, now {len(wanted)}"  # type: ignore[arg-type]
    if name == "teachers":
        changed = [
            f"{key} {old[key]!r}, now {new[key]!r}"
            for old, new in zip(begun, wanted, strict=True)  # type: ignore[call-overload]
            for key in new
            if old.get(key) != new[key]
        ]
        return f"another teacher ({'; '.join(changed)})"
    return f"{name} {begun!r}, now it is {wanted!r}"

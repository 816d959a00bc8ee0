"""The dump loop: run the teacher over every missing row and write its soft targets to the cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from softcache.cache import Cache, Header, Sampled, open_cache
from softcache.cache.allocate import Stored
from softcache.cache.arrays import INPUTS
from softcache.cache.merge import copy_view
from softcache.cache.reader import partial_path
from softcache.cache.summary import measure_rows, summary_row_count, warning_field, warnings_of
from softcache.cache.writer import Writer
from softcache.data.augment import Augmentation
from softcache.data.label_sets import check_batch_labels, stored_labels
from softcache.data.loader import Batch, Request, augmented, loader, make_request
from softcache.data.source import Source
from softcache.data.table_columns import columns_field
from softcache.data.tables import columns_of
from softcache.data.workers import worker_failures
from softcache.dump.check_resume import check_same
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import (
    fidelity_line,
    hint_of_tail,
    measure_fidelity,
    repeats_warnings,
)
from softcache.dump.memorized import memorized_labels
from softcache.dump.pipeline import BackgroundConsumer, Stopwatch, prefetch
from softcache.dump.prepare import (
    check_out,
    describe_inputs,
    draft_header,
    open_unfinished,
    prepare,
    with_batch_size,
)
from softcache.dump.processes import ProcessGroup, join_processes
from softcache.dump.reuse import aside_path, can_reuse, take_over
from softcache.dump.rows import (
    RowBatches,
    encode_rows,
    row_index,
    sample_batches,
    segments,
)
from softcache.errors import DataError, Interrupted, RemoteError, SettingsError
from softcache.join.fingerprints import check_replay
from softcache.targets.encode import HostCopy, as_arrays, make_encoder
from softcache.targets.fetch import shared_tensors
from softcache.teachers.ensemble import Ensemble
from softcache.teachers.matrix import Matrix
from softcache.util.lock import exclusive
from softcache.util.log import inform, verdict
from softcache.util.progress import progress
from softcache.util.signals import deferred_stop

MOST_WARNINGS = 8  # that a header keeps
# per process and view: few enough for runs to be long, many enough to balance slow processes
RUNS_OF_A_PROCESS = 8
MOST_MOVED = 0.02  # share of the probability that other batches can move, with room
SERVER_ADVICE = "the server is the bottleneck; try more concurrency=, with more --batch-tokens"


def dump(config: DumpConfig) -> Cache:
    """Write the teacher's soft targets for every sample of the data to `config.out`.

    Running the same dump again after an interruption resumes it. If a finished cache has fewer
    views than requested, they are copied to a new file and the others are added; the old file is
    kept until the new one is complete.

    Returns:
        The complete cache.

    Raises:
        SoftcacheError: the settings, the data or the teacher are invalid, or the disk fails;
            finished work is kept.
    """
    group = join_processes()
    try:
        check_out(config.out, overwrite=config.overwrite)
        with exclusive(config.out) if group.first else nullcontext(), worker_failures():
            return dump_in_process(config, group)
    except BaseException:
        group.fail()
        raise


def dump_in_process(config: DumpConfig, group: ProcessGroup) -> Cache:
    """One process's part of a dump; the first process also creates the file and finishes it."""
    source, augmentation, teacher = prepare(config)
    draft = draft_header(config, source, teacher)
    finished = open_finished(config, draft, source, augmentation)
    if finished is not None and finished.header.views == draft.views:
        if group.first:
            inform(f"{config.out} is already complete; nothing to do (--overwrite starts again)")
        return finished
    try:
        if group.first:
            config = with_batch_size(config, source, teacher, augmentation)
            open_unfinished(config, draft, source, teacher, augmentation, finished)
            if finished is not None:
                copy_views(finished, config.out)
            if group.size > 1:  # before the others look which rows are missing
                with Writer(config.out) as writer:
                    take_over(writer, config, source)
        config = replace(config, batch_size=group.broadcast("batch size", config.batch_size))
        with Writer(config.out) as writer:
            if group.size == 1:
                take_over(writer, config, source)
            watch = fill_cache(writer, config, source, teacher, augmentation, group)
        group.barrier()
        if group.first:
            finish_dump(config, source, teacher, augmentation)
            aside_path(config.out).unlink(missing_ok=True)
            header = open_cache(config.out).header
            fidelity = (header.summary or {})["fidelity"]
            inform(fidelity_line(fidelity, isinstance(header.encoding, Sampled)))
            inform(watch.advice(SERVER_ADVICE if teacher.asks_server else None))
            for warning in (header.summary or {}).get("warnings", []):
                verdict(warning)
        group.barrier()
    except RemoteError as error:
        partial = partial_path(config.out)
        if not partial.exists():
            raise
        raise RemoteError(
            f"{error}. The finished rows are kept in {partial}: run the same command again to continue"
        ) from None
    except KeyboardInterrupt:
        partial = partial_path(config.out)
        if not partial.exists():
            raise Interrupted("stopped; nothing was written") from None
        raise Interrupted(
            f"stopped; the finished rows are kept in {partial}: run the same command again to continue"
        ) from None
    return open_cache(config.out)


def open_finished(
    config: DumpConfig, draft: Header, source: Source, augmentation: Augmentation
) -> Cache | None:
    """The cache at `config.out` if it holds this dump or its first views; None if there is none.

    Raises:
        SettingsError: it is the cache of another dump, or has more views than requested.
    """
    if not config.out.exists() or config.overwrite:
        return None
    finished = open_cache(config.out)
    try:
        check_same(finished, draft, source, config.eval_data, config.like, ignored=["views"])
    except SettingsError as error:
        if not can_reuse(finished, draft, config):
            raise
        raise SettingsError(
            f"{error}. A dump to another --out with --like {config.out} takes over the rows of all samples "
            "that it knows"
        ) from error
    if finished.header.views >= draft.views:
        check_same(finished, draft, source, config.eval_data, config.like)
        return finished
    source_indices = np.arange(len(source))
    dumped = source_indices[draft.first_sample : draft.first_sample + draft.samples]
    check_replay(finished, source, augmentation, dumped, source_indices)
    return finished


def finish_dump(
    config: DumpConfig, source: Source, teacher: Ensemble, augmentation: Augmentation
) -> None:
    """Summarize and judge the rows, measure their fidelity, and give the file its final name.

    Raises:
        DataError: `strict` is set, and a result cannot be right; the rows are kept.
    """
    # no recheck: older blocks were checked at the start, and this job wrote all the others
    with Writer(config.out, recheck=False) as writer:
        with progress("summary", summary_row_count(writer.cache), "rows") as advance:
            statistics = measure_rows(writer.cache, advance)
        warnings = warnings_of(
            writer.cache,
            statistics,
            by_row=any(isinstance(member.model, Matrix) for member in teacher.teachers),
            inputs=describe_inputs(source, augmentation, config.first_view),
        )
        refuse_if_strict(config, warnings)
        fidelity = measure_fidelity(
            writer.cache, source, teacher, augmentation, workers=config.workers
        )
        if fidelity["moved"] > MOST_MOVED:
            warnings = [random_teacher(fidelity["moved"]), *warnings]
        warnings = [*repeats_warnings(fidelity), *warnings][:MOST_WARNINGS]
        refuse_if_strict(config, warnings)
        summary = statistics.summary() | columns_field(columns_of(source))
        summary |= warning_field(warnings)
        writer.finish(summary | {"fidelity": fidelity})
    for hint in (memorized_labels(teacher, statistics), hint_of_tail(writer.header, fidelity)):
        if hint:
            verdict(hint)


def random_teacher(moved: float) -> str:
    """What is wrong where the teacher does not repeat itself."""
    return (
        f"the teacher gives other outputs when it runs on the same samples again ({moved:.1%} of the "
        "probability moves). Likely causes: dropout or another random layer left on, or data with a random "
        "state"
    )


def refuse_if_strict(config: DumpConfig, warnings: Sequence[str]) -> None:
    """Raise DataError for the first warning if `strict` is set."""
    if warnings and config.strict:
        raise DataError(
            f"{warnings[0]}. The rows are kept in {partial_path(config.out)}: correct the cause and dump "
            "with --overwrite, or accept them with the same command without --strict (import: with "
            "--no-strict)"
        )


def copy_views(finished: Cache, out: Path) -> None:
    """Copy the views of a finished cache into the unfinished file of `out`, which holds more."""
    header = finished.header
    inform(f"adding views to {finished.path}, which already has {header.views}")
    with (
        Writer(out) as writer,
        progress("copy", header.row_count * header.views, "rows") as advance,
    ):
        for view in range(header.views):
            copy_view(finished, writer, view, advance)


def fill_cache(
    writer: Writer,
    config: DumpConfig,
    source: Source,
    teacher: Ensemble,
    augmentation: Augmentation,
    group: ProcessGroup,
) -> Stopwatch:
    """The dump loop over all batches with missing rows; loading, teacher and disk run concurrently.

    Batch boundaries are the same after a resume and with any number of processes: every row is
    computed in the same batch, and the file comes out identical to the byte.

    Returns:
        The time spent in each stage.
    """
    header, device, watch = writer.header, teacher.device, Stopwatch()
    encode = make_encoder(
        header.encoding,
        shared_tensors(writer.cache),
        temperature=header.temperature,
        seed=header.seed,
        device=device,
    )
    in_flight: deque[Task] = deque()

    def requests() -> Iterator[Request]:
        for task in missing_batches(writer, config, source, group):
            in_flight.append(task)
            sample_ids = header.first_sample + task.samples
            view = header.first_view + task.view
            request = make_request(augmentation, sample_ids.tolist(), view, sample_ids)
            # raw inputs are stored once, with view 0, like labels and keys
            yield replace(request, raw=header.embeds_inputs and task.view == 0)

    def store(item: tuple[Task, Batch, HostCopy]) -> None:
        task, batch, copy = item
        if writer.cache.layout is not None:
            write_rows(writer, task, batch, as_arrays(copy.wait()))
            return
        first = int(task.samples[0])
        start, stop = task.rows.start - first, task.rows.stop - first
        rows = {name: values[start:stop] for name, values in as_arrays(copy.wait()).items()}
        keys = batch.keys.numpy().view(np.uint64)
        labels = stored_labels(batch, header)
        samples = {name: values[start:stop] for name, values in labels.items()}
        samples["keys"] = keys[start:stop]
        if len(batch.raw):
            samples[INPUTS] = batch.raw.numpy()[start:stop]
        writer.write(task.view, task.rows.start, rows, samples)

    batches = loader(
        source,
        requests(),
        augmentation=augmentation,
        workers=config.workers,
        keys=True,
        pin_memory=device.type == "cuda",
    )
    total = header.row_count * header.views
    done = total - sum(int(writer.missing(view).sum()) for view in range(header.views))
    with (
        deferred_stop() as stop,
        progress("dump", total, "rows", done) as advance,
        BackgroundConsumer(store) as disk,
    ):
        for batch in watch.waits("data", prefetch(batches)):
            if stop.signal:
                break  # what is done is committed, then deferred_stop() raises KeyboardInterrupt
            task = in_flight.popleft()
            with watch.time("teacher"):
                sample_ids, view = batch.sample_ids.numpy(), header.first_view + task.view
                check_batch_labels(batch, header.classes, source)
                inputs = augmented(batch, augmentation, view, sample_ids, device)
                if header.rows is None:
                    log_probs = teacher.log_probs(inputs, header.temperature, sample_ids)  # (B, C)
                    encoded = encode(log_probs, view, sample_ids)
                else:
                    rows = row_index(batch)
                    encoded = encode_rows(
                        encode, teacher, inputs, rows, header.temperature, view, sample_ids
                    )
                copy = HostCopy.of(encoded)
            with watch.time("disk"):
                disk.put((task, batch, copy))
            advance(group.add_rows(task.missing), watch.note())
        with watch.time("disk"):
            disk.finish()
    return watch


@dataclass(frozen=True)
class Task:
    """A batch to compute. Ranges are cache rows; views are counted from the cache's first."""

    view: int
    samples: npt.NDArray[np.int64]  # (B,) the samples of the cache to compute together
    rows: range  # those of their rows that this process writes
    missing: int  # how many of `rows` are not in the file yet


def write_rows(writer: Writer, task: Task, batch: Batch, encoded: Stored) -> None:
    """Write the rows of samples that have many; their keys are in the file already.

    Raises:
        DataError: a sample is another one than it was when the dump began.
    """
    layout = writer.cache.layout
    keys, labels = batch.keys.numpy().view(np.uint64), batch.labels.numpy()
    differs = np.flatnonzero(keys != writer.cache.keys[task.samples])
    if len(differs):
        raise DataError(
            f"sample {int(batch.source_indices[differs[0]])} is another one than when the dump began; give "
            "it data that stay the same"
        )
    for first, part in segments(layout, task.samples, task.rows) if layout else ():
        rows = {name: values[part] for name, values in encoded.items()}
        writer.write(task.view, first, rows, {"labels": labels[part]})


def missing_batches(
    writer: Writer, config: DumpConfig, source: Source, group: ProcessGroup
) -> Iterator[Task]:
    """The batches with missing rows, view by view.

    Several processes take turns: each takes the next run of blocks when it has finished its last
    one, so that a slow process does not hold up the others.
    """
    header, batch_size, layout = writer.header, config.batch_size, writer.cache.layout
    batches = None
    if layout is not None:
        samples = sample_batches(
            source,
            header.sample_range,
            batch_size,
            config.tokens_of_batch,
            in_order=bool(config.servers),
        )
        batches = RowBatches(layout, samples, header.first_sample)
    blocks_per_run = header.blocks
    if group.size > 1:
        blocks_per_batch = -(-batch_size // header.block_rows)
        balanced = header.blocks // (RUNS_OF_A_PROCESS * group.size)
        blocks_per_run = max(1, blocks_per_batch, balanced)
    runs_per_view = -(-header.blocks // blocks_per_run)
    while (run := group.add("runs", 1) - 1) < runs_per_view * header.views:
        view, run_of_view = divmod(run, runs_per_view)
        start = run_of_view * blocks_per_run * header.block_rows
        stop = min(header.row_count, start + blocks_per_run * header.block_rows)
        if batches is not None:
            for batch_samples in batches.with_rows_in(range(start, stop)):
                missing = batches.missing(writer.missing(view, start, stop), batch_samples, start)
                if missing:
                    yield Task(view, batch_samples, range(start, stop), missing)
            continue
        for first in range(start - start % batch_size, stop, batch_size):
            batch = range(first, min(first + batch_size, header.samples))
            rows = range(max(first, start), min(batch.stop, stop))
            missing = int(writer.missing(view, rows.start, rows.stop).sum())
            if missing:
                yield Task(view, np.arange(batch.start, batch.stop), rows, missing)

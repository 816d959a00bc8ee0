"""Commands for finished caches: info, verify, repair, merge, import, export-labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from softcache.cli.commands import OUTPUT, PATH, Command, option, out_option, settings_options
from softcache.dump.config import DumpConfig
from softcache.errors import Interrupted, SettingsError

TRAINERS = ("axolotl", "distillkit")  # as export_columns.FORMATS, which would import torch


@click.command(cls=Command)
@click.argument("cache", metavar="CACHE|URL")
@option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def info(cache: str, as_json: bool) -> None:
    """Show what a cache holds, without reading (or, for a URL, fetching) its rows."""
    from softcache.cache import open_cache
    from softcache.files.describe import describe, facts
    from softcache.util.log import verdict

    if "://" in cache:
        from softcache.files.remote import open_remote

        remote = open_remote(cache)
        opened, name = remote.with_names(), remote.file.shown
    else:
        opened, name = open_cache(cache, unfinished=True), cache
    click.echo(json.dumps(facts(opened), indent=2) if as_json else describe(opened, name))
    for warning in (opened.header.summary or {}).get("warnings", ()):
        verdict(warning)


@click.command(cls=Command)
@click.argument("cache", type=PATH)
@option("--expect", metavar="CONTENT_ID", help="Fail unless the cache has this content id.")
@option("--teacher", multiple=True, metavar="SPEC", help="Teacher to run again, as for dump.")
@option("--weights", type=PATH, multiple=True, metavar="FILE", help="Weights of each --teacher.")
@settings_options(DumpConfig, only=("teacher_classes", "trust_code", "same_classes"))
@option("--data", metavar="SPEC", help="Samples on which to run the teacher again.")
@option(
    "--rows",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Number of rows to compute again.",
)
@option(
    "--augment",
    metavar="SPEC",
    help="All of the cache's own augmentation, if that has a callable, with the path to its file.",
)
@settings_options(DumpConfig, only=("device",))
def verify(cache: Path, expect: str | None, **options: Any) -> None:
    """Check every byte of a cache against its digests, and list what is damaged.

    With --teacher and --data, random rows are also computed again and compared with the stored ones.
    """
    from softcache.files.verify import verify_cache

    click.echo(verify_cache(cache, expect))
    if options["teacher"] or options["data"]:
        from softcache.files.recheck import recheck_rows

        click.echo(recheck_rows(cache, **options))


@click.command(cls=Command)
@click.argument("cache", type=PATH)
def repair(cache: Path) -> None:
    """Mark the damaged blocks of a cache as missing, so that softcache dump fills them again."""
    from softcache.files.verify import repair_cache

    click.echo(repair_cache(cache))


@click.command(cls=Command)
@click.argument("caches", type=PATH, nargs=-1, required=True)
@out_option("Cache file to write.", metavar="FILE")
def merge(caches: tuple[Path, ...], out: Path) -> None:
    """Join the shards or ranges of views of one dump, or both, into one file.

    Every block is checked as it is copied. A merge that was stopped continues when the same command is
    run again.
    """
    from softcache.cache import open_cache
    from softcache.cache.merge import merge
    from softcache.util.log import verdict
    from softcache.util.progress import progress

    parts = [open_cache(path) for path in caches]
    total = sum(part.header.views * part.header.row_count for part in parts)
    with progress("merge", total, "rows") as advance:
        try:
            merged = merge(parts, out, advance)
        except KeyboardInterrupt:
            raise Interrupted("stopped; the same command continues") from None
    for warning in (merged.header.summary or {}).get("warnings", ()):
        verdict(warning)
    header = merged.header
    rows = "" if header.rows is None else f" of {header.row_count:,} {header.unit}s"
    click.echo(
        f"{out}: {header.samples:,} samples{rows} x {header.views} view(s), {header.file_bytes:,} bytes; "
        f"content id {merged.content_id()}"
    )


@click.command("import", cls=Command)
@click.argument("source", metavar="SOURCE")
@option(
    "--temperature",
    type=float,
    help="Temperature of the cache.  [default: the temperature of SOURCE]",
)
@option(
    "--encoding",
    metavar="SPEC",
    help="How each row is stored.  [default: dense; topk where SOURCE has the largest entries]",
)
@settings_options(
    DumpConfig,
    only=(
        "data",
        "teacher_output",
        "teacher_temperature",
        "classes",
        "augment",
        "seed",
        "same_classes",
        "embed_inputs",
        "out",
        "overwrite",
    ),
)
@option(
    "--view",
    type=int,
    default=0,
    show_default=True,
    help="View of --augment that the teacher saw.",
)
@option(
    "--strict/--no-strict",
    default=True,
    show_default=True,
    group=OUTPUT,
    help="Exit with an error if the rows cannot belong to these samples and labels.",
)
def import_labels(**options: Any) -> None:
    """Make a cache of soft targets that you already have.

    \b
    SOURCE is one of
      FILE.npy, FILE.npz, FILE.pt                     a matrix (samples, classes), in the order of
                                                      the data
      hfds:ID_OR_FOLDER?ids=COLUMN&log_probs=COLUMN   the k largest of each row, from a Hugging
                                                      Face dataset (data extra)
      FILE.jsonl, FILE.parquet, hfds:ID_OR_FOLDER     the largest of each token of documents, as
                                                      axolotl, DistillKit and vLLM write them

    \b
    Documents are found in --data by their token ids. Options of such a SOURCE, after a ?:
      rows=next, rows=same         the list at position i is about token i + 1, or token i
      ids=COLUMN&log_probs=COLUMN  columns by other names
      config=FILE.yaml             the configuration of DistillKit's compression

    If the teacher saw augmented samples, name the augmentation with --augment: training makes the same
    view again. export-labels says which one it wrote.
    """
    from softcache.files.describe import cache_line
    from softcache.files.import_labels import import_labels

    click.echo(cache_line(import_labels(**options)))


@click.command("export-labels", cls=Command)
@click.argument("cache", type=PATH)
@out_option("File to write.", metavar="FILE.npy|FILE.parquet|FILE.jsonl")
@option("--temperature", type=float, help="Temperature of the softmax.  [default: the cache's]")
@option("--view", type=int, default=0, show_default=True, help="View to export.")
@option(
    "--log-probabilities", is_flag=True, help="Write log-probabilities instead of probabilities."
)
@option(
    "--columns",
    type=click.Choice(TRAINERS),
    help="Columns of a trainer to write, a document per row; of tokens.",
)
@option(
    "--top",
    type=click.IntRange(min=1),
    help="Largest entries of each token, with --columns.  [default: all of a topk cache, else 64]",
)
@option(
    "--data", metavar="SPEC", help="Documents, with --columns, if the cache does not store them."
)
def export_labels(cache: Path, out: Path, **options: Any) -> None:
    """Write the soft targets of one view as an .npy matrix (samples, classes) float32, or as Parquet.

    A Parquet row (data extra) holds sample, label, key and the list of probabilities. The reverse is
    softcache import, which makes a cache of a matrix.

    Of tokens, --columns writes JSON Lines or Parquet with a document on each line or row, from which
    axolotl or DistillKit trains. The list at position i is about token i + 1.
    """
    from softcache.files.export_columns import export_columns
    from softcache.files.export_labels import export_labels

    sparse = {name: options.pop(name) for name in ("columns", "top", "data")}
    if sparse["columns"] is None:
        given = next((name for name, value in sparse.items() if value is not None), None)
        if given:
            raise SettingsError(f"--{given} goes with --columns; add it, or leave --{given} out")
        click.echo(export_labels(cache, out, **options))
        return
    if options.pop("log_probabilities"):
        raise SettingsError(
            "--columns always writes log-probabilities; leave --log-probabilities out"
        )
    click.echo(export_columns(cache, out, **sparse, **options))

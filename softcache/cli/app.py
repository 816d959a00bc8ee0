"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from softcache._version import __version__
from softcache.cli.params import BatchSize, Numbers, Shard, ViewRange, read_config
from softcache.errors import Interrupted, SoftcacheError

# torch takes seconds to import: each command imports what it needs when it runs
PATH = click.Path(path_type=Path)


class Commands(click.Group):
    """Prints softcache's own errors in one line, and exits with their code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Error: stopped; nothing was begun", err=True)
            raise click.exceptions.Exit(Interrupted.exit_code) from None
        except (SoftcacheError, OSError) as error:
            if ctx.params["traceback"]:
                raise
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error


@click.group(cls=Commands, context_settings={"max_content_width": 100, "show_default": True})
@click.version_option(__version__, package_name="softcache")
@click.option("--traceback", is_flag=True, help="Show where an error came from.")
def main(traceback: bool) -> None:
    """Run the teacher once: cache its soft targets in one file, distil any number of students."""


@main.command()
@click.option(
    "--teacher",
    required=True,
    multiple=True,
    metavar="SPEC",
    help="The model; see below. Given more than once, their softened probabilities are averaged.",
)
@click.option(
    "--weights",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="safetensors, or a checkpoint of tensors; one for each teacher.",
)
@click.option(
    "--teacher-weight", type=float, multiple=True, help="Share of each teacher in the average."
)
@click.option(
    "--teacher-output",
    type=click.Choice(["logits", "probabilities", "log_probabilities"]),
    default="logits",
    help="What the teacher gives.",
)
@click.option(
    "--teacher-temperature", type=float, default=1.0, help="At which that was softened already."
)
@click.option("--data", required=True, metavar="SPEC", help="The samples; see below.")
@click.option("--temperature", type=float, default=4.0, help="T of softmax(logits / T).")
@click.option("--out", required=True, type=PATH, metavar="FILE", help="The cache to write.")
@click.option("--eval-data", metavar="SPEC", help="Record the teacher's errors on these.")
@click.option(
    "--views",
    type=ViewRange(),
    default="1",
    metavar="N|A:B",
    help="Augmented versions of every sample: 0 to N - 1, or A to B - 1.",
)
@click.option(
    "--shard", type=Shard(), default="0/1", metavar="i/n", help="Only part i of n of the samples."
)
@click.option("--augment", metavar="SPEC", help="How views differ; see below.")
@click.option("--seed", type=int, default=0, help="Of the augmentation.")
@click.option("--encoding", metavar="SPEC", default="dense", help="How a row is stored; see below.")
@click.option(
    "--like", type=PATH, metavar="CACHE", help="Encode as this cache does, to be merged with it."
)
@click.option("--max-kl", type=float, default=1e-3, help="Of --encoding auto, at T, 1, 2, 4 and 8.")
@click.option("--dry-run", is_flag=True, help="Say size, time and encodings; write nothing.")
@click.option("--classes", type=int, help="How many are expected; else as the teacher gives.")
@click.option(
    "--batch-size",
    type=BatchSize(),
    default="256",
    metavar="N|auto",
    help="Samples in one pass of the teacher; auto: the fastest that fits.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
@click.option("--precision", default="fp32", help="Of the teacher: fp32, tf32, bf16 or fp16.")
@click.option("--compile", is_flag=True, help="torch.compile the teacher.")
@click.option("--workers", type=int, default=0, help="Processes that load data.")
@click.option(
    "--embed-inputs", is_flag=True, help="Keep the samples in the cache: train needs no --data."
)
@click.option("--overwrite", is_flag=True, help="Make a finished or begun cache anew.")
def dump(**options: Any) -> None:
    """Write a teacher's soft targets for every sample into one file.

    Run again after any stop, the same command goes on where it stopped. Until the cache is
    complete it is called FILE.partial. On several GPUs of a host, torchrun --nproc-per-node N -m
    softcache dump fills one file; several hosts take a --shard each, which softcache merge puts
    together.

    \b
    A teacher is one of
      FILE.py:CALLABLE, package.module:CALLABLE   returns a torch nn.Module, or a function
                                                  of numpy inputs (B, ...) that gives (B, classes)
      FILE.pt2                                    an exported program
      FILE.onnx                                   through onnxruntime
      FILE.npy, FILE.npz, FILE.pt                 a matrix: see softcache import
      hf:ID_OR_FOLDER                             of transformers, images or texts (softcache[hf])
      timm:NAME                                   of timm (softcache[timm])
      mlp:800,800                                 hidden sizes
      cnn:32x2,64x2                               widths, each with how many layers
      resnet:20,16                                depth and first width
    Data are one of, each with @SPLIT at the end if wanted (default: train)
      idx:DIR           IDX files under MNIST's own names, plain or gzipped
      npz:FILE          arrays x and y, or x_SPLIT and y_SPLIT
      folder:DIR        images, one sub-folder per class
      hfds:ID_OR_FOLDER of Hugging Face's datasets: hub, save_to_disk, Parquet (softcache[data])
      csv:, parquet:FILE  a table of numbers, ?label=COLUMN&inputs=A,B (softcache[data])
      FILE.py:CALLABLE  returns a map-style torch Dataset
    Options stand behind a ?, with & between them, such as
      folder:DIR?size=256              the shorter side to 256, and the middle; also size=192x256
      hfds:ID?input=COLUMN&label=COLUMN&name=CONFIG@test[:1000]
      hf:vit?pretrained=false&hidden_size=192     a student of random weights (--student)
      hf:FOLDER?tokenizer=ID_OR_FOLDER            or processor=, where they lie elsewhere
    An augmentation is one or more, with commas, of
      FILE.py:CALLABLE  your own, first: one raw sample in, one out; randomness is seeded
      shift:PIXELS      moved by up to so many pixels each way
      flip              mirrored left to right, or not
      crop:AREA         random resized crop of at least this share of the image
      jitter:STRENGTH   brightness, contrast, saturation times 1 - to 1 + STRENGTH
      cutout:PIXELS     a square of this side is blank
      mixup             last: mixed with another sample, by a uniform share
    An encoding is one of
      dense             float16 log-probabilities, 2 bytes a class
      quantized         8 bits a class
      topk:K            the K largest, and the tail's mass at several temperatures
      basis:BYTES,K     fitted to the teacher: BYTES of coefficients, K exact entries
      sampled:N         N draws, for large vocabularies; at its own temperature only
      auto              the smallest that keeps KL within --max-kl, measured
    """
    options["first_view"], options["views"] = options["views"]
    from softcache.dump.config import DumpConfig
    from softcache.dump.dry_run import dry_run
    from softcache.dump.loop import dump
    from softcache.results.tables import cache_line

    dry = options.pop("dry_run")
    config = DumpConfig(**options)
    line = dry_run(config) if dry else cache_line(dump(config))
    if os.environ.get("RANK", "0") == "0":
        click.echo(line)


@main.command()
@click.argument("cache", nargs=-1, metavar="[CACHE|URL]...")
@click.option(
    "--student",
    multiple=True,
    metavar="SPEC",
    help="The model, as in dump. Several are trained together, each into a folder of DIR.",
)
@click.option(
    "--grid",
    multiple=True,
    metavar="NAME=A,B",
    help="A student for each value of a setting, of several for each combination.",
)
@click.option(
    "--config",
    "tables",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    callback=read_config,
    metavar="TOML",
    help="These options in a file, and students in [[student]] tables, whose settings are stronger "
    "than the options.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="SPEC",
    help="The samples, as in dump; of several CACHE, one for each in the same order, or one for all. "
    "Not needed if CACHE holds its inputs.",
)
@click.option("--eval-data", metavar="SPEC", help="Count errors on these after every epoch.")
@click.option("--out", required=True, type=PATH, metavar="DIR", help="Folder of the run.")
@click.option("--epochs", type=int, default=20)
@click.option("--batch-size", type=int, default=128)
@click.option(
    "--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", help="sgd is Nesterov's."
)
@click.option(
    "--lr", "learning_rate", type=float, help="At its highest.  [default: 2e-3; of sgd 0.05]"
)
@click.option("--momentum", type=float, default=0.9, help="Of sgd.")
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default="cosine")
@click.option("--warmup", type=float, default=0.05, help="Share of the steps.")
@click.option("--weight-decay", type=float, help="[default: 0.01; of sgd 5e-4]")
@click.option("--clip", type=float, help="The gradient's norm, at the most.")
@click.option("--accumulate", type=int, default=1, help="Parts of a batch, if memory is short.")
@click.option("--ema", type=float, help="Evaluate and save averaged weights; decay, such as 0.999.")
@click.option("--alpha", type=float, help="Weight of the soft targets.  [default: 0.9]")
@click.option("--temperature", type=float, help="Of the soft targets.  [default: the cache's]")
@click.option(
    "--loss", default="kl", metavar="NAME", help="kl, reverse_kl, js, mse, or dkd:BETA; see below."
)
@click.option("--label-smoothing", type=float, default=0.0, help="Of the cross-entropy.")
@click.option("--seed", type=int, default=0, help="Of the student and the order of samples.")
@click.option("--augment", metavar="SPEC", help="Without CACHE, or the file of CACHE's own.")
@click.option(
    "--extra-augment", metavar="SPEC", help="On top of the cache's own: targets become inexact."
)
@click.option("--baseline", is_flag=True, help="Also train the twin on hard labels only.")
@click.option("--init", type=PATH, metavar="WEIGHTS", help="Begin with these weights.")
@click.option(
    "--patience",
    type=int,
    metavar="EPOCHS",
    help="Stop after so many without fewer errors on --eval-data, and keep the best weights.",
)
@click.option("--classes", type=int, help="Without CACHE, where the data do not say.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), default="no")
@click.option("--workers", type=int, default=0, help="Processes that load data.")
@click.option(
    "--rotate/--no-rotate",
    default=True,
    help="An epoch mixes the views of CACHE; --no-rotate: it reads one, if memory is short.",
)
@click.option(
    "--checkpoint-minutes",
    type=float,
    default=10.0,
    help="Between two checkpoints within an epoch; there is one after each.",
)
@click.option("--tensorboard", is_flag=True, help="Logs for TensorBoard (softcache[tensorboard]).")
@click.option("--verify/--no-verify", default=True, help="Check all digests of CACHE first.")
@click.option(
    "--overwrite", is_flag=True, help="Replace a finished run in DIR, or one begun otherwise."
)
def train(**options: Any) -> None:
    """Train students from CACHE; without CACHE, train a model on the labels alone.

    What is named by a URL is pulled first, into the folder softcache of $XDG_CACHE_HOME (~/.cache).

    Of several caches, every batch is drawn from all samples alike: labelled and unlabelled ones, or
    the shards of a dump. FILE.partial, which a dump has not completed, gives its complete views.

    Run again after any stop, the same command goes on from its last checkpoint.

    The loss is alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy with the labels.

    \b
    In the place of the KL may stand
      reverse_kl   KL(student ‖ teacher)
      js           Jensen-Shannon divergence
      mse          half the mean squared error of the centred logits
      dkd:BETA     decoupled KD: KL of label against others + BETA KL among the others
    """
    from softcache.files.pull import local_copy
    from softcache.train.config import TrainConfig
    from softcache.train.grid import make_variants
    from softcache.train.loop import train

    few = None if options["rotate"] else options["epochs"]
    options["cache"] = [local_copy(place, most_views=few) for place in options["cache"]]
    students, grid, tables = (options.pop(name) for name in ("student", "grid", "tables"))
    options["student"], options["variants"] = make_variants(students, grid, tables)
    train(TrainConfig(**options))


@main.command()
@click.argument("cache", metavar="CACHE|URL")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(cache: str, as_json: bool) -> None:
    """Show what a cache says of itself; its rows are not read, of a URL not even fetched."""
    from softcache.cache import open_cache
    from softcache.files.describe import describe, facts

    if "://" in cache:
        from softcache.files.remote import open_remote

        remote = open_remote(cache)
        found, name = remote.with_names(), remote.file.shown
    else:
        found, name = open_cache(cache, unfinished=True), cache
    click.echo(json.dumps(facts(found), indent=2) if as_json else describe(found, name))


@main.command()
@click.argument("source", metavar="URL|PATH")
@click.option("-o", "--out", type=PATH, required=True, metavar="FILE", help="The cache to write.")
@click.option("--views", type=Numbers(), metavar="A:B", help="Only views A to B - 1.")
@click.option("--samples", type=Numbers(), metavar="A:B", help="Only samples A to B - 1.")
@click.option("--expect", metavar="CONTENT_ID", help="Fail if the cache is not this one.")
@click.option("--overwrite", is_flag=True, help="Replace FILE, or a pull that was begun otherwise.")
def pull(source: str, **options: Any) -> None:
    """Fetch a cache, or a part of it, from a server or a disk.

    URL is http://, https:// (softcache[remote]), s3:// (softcache[s3]), gs:// (softcache[gcs]), hf://
    (softcache[hub]) or a path. Byte ranges are fetched side by side, and every block is checked
    against its digest as it lands. Run again after any stop, the same command goes on.
    """
    from softcache.files.pull import pull
    from softcache.results.tables import cache_line

    click.echo(cache_line(pull(source, **options)))


@main.command()
@click.argument("cache", type=PATH)
@click.argument("url")
@click.option("--overwrite", is_flag=True, help="Replace another file that is there.")
def push(cache: Path, url: str, overwrite: bool) -> None:
    """Put a cache to a URL (s3://, gs://, hf://) or a path, with a card (README.md) beside it.

    It is verified before, and its header and digests are read back after.
    """
    from softcache.files.push import push

    click.echo(push(cache, url, overwrite=overwrite))


@main.command()
@click.argument("cache", type=PATH)
@click.option("--expect", metavar="CONTENT_ID", help="Fail if the cache is not this one.")
@click.option("--teacher", multiple=True, metavar="SPEC", help="Ask it again, as in dump.")
@click.option("--weights", type=PATH, multiple=True, metavar="FILE", help="Of each teacher.")
@click.option("--data", metavar="SPEC", help="The samples to ask the teacher about.")
@click.option("--rows", type=click.IntRange(min=1), default=256, help="How many rows to ask.")
@click.option("--augment", metavar="SPEC", help="The file of the cache's own callable, if any.")
@click.option("--device", default="auto", help="For the teacher.")
def verify_cache(cache: Path, expect: str | None, **options: Any) -> None:
    """Check every byte of a cache against its digests, and name what is damaged.

    With a teacher and data, random rows are computed again and compared.
    """
    from softcache.files.verify import verify_cache

    print(verify_cache(cache, expect))
    if options["teacher"] or options["data"]:
        from softcache.files.recheck import recheck_rows

        print(recheck_rows(cache, **options))


@main.command()
@click.argument("caches", type=PATH, nargs=-1, required=True)
@click.option("--out", required=True, type=PATH, metavar="FILE", help="The cache to write.")
def merge(caches: tuple[Path, ...], out: Path) -> None:
    """Put shards of samples, views, or both of one dump into one file.

    Every block is checked as it is copied. Run again after a stop, it goes on.
    """
    from softcache.cache import open_cache
    from softcache.cache.merge import merge
    from softcache.util.progress import progress

    parts = [open_cache(path) for path in caches]
    total = sum(part.header.views * part.header.samples for part in parts)
    with progress("merge", total, "rows") as advance:
        try:
            found = merge(parts, out, advance)
        except KeyboardInterrupt:
            raise Interrupted("stopped; the same command goes on") from None
    header = found.header
    click.echo(
        f"{out}: {header.samples:,} samples x {header.views} view(s), {header.file_bytes:,} bytes; "
        f"content id {found.content_id()}"
    )


@main.command()
@click.argument("cache", type=PATH)
def repair_cache(cache: Path) -> None:
    """Mark the damaged blocks of a cache as missing, for softcache dump to fill again."""
    from softcache.files.verify import repair_cache

    print(repair_cache(cache))


@main.command()
@click.argument("run", type=PATH)
@click.option("--onnx", is_flag=True, help="RUN/student.onnx (softcache[onnx]).")
@click.option("--pt2", is_flag=True, help="RUN/student.pt2, an exported program of torch.")
@click.option(
    "--hf", is_flag=True, help="RUN/student-hf, a folder for transformers, of a student of hf:."
)
@click.option(
    "--student",
    multiple=True,
    metavar="SPEC",
    help="Where its code is, if it is not a built-in one.",
)
def export_student(run: Path, **options: Any) -> None:
    """Write the student of a run in formats for serving, each checked against the student.

    ONNX and pt2 take (B, *shape) float32, images in [0, 1], and give (B, classes) logits, for any B.
    """
    from softcache.results.export import export_student

    for path in export_student(run, **options):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        click.echo(f"{path}: {size:,} bytes, gives the student's logits")


@main.command("import")
@click.argument("source", metavar="SOURCE")
@click.option("--data", required=True, metavar="SPEC", help="The samples, as in dump.")
@click.option("--out", required=True, type=PATH, metavar="FILE", help="The cache to write.")
@click.option(
    "--holds",
    "teacher_output",
    type=click.Choice(["logits", "probabilities", "log_probabilities"]),
    default="logits",
    help="What SOURCE holds.",
)
@click.option(
    "--softened", "teacher_temperature", type=float, default=1.0, help="At which temperature."
)
@click.option("--temperature", type=float, help="Of the cache.  [default: that of SOURCE]")
@click.option("--encoding", metavar="SPEC", help="As in dump.  [default: dense; of hfds: topk]")
@click.option("--classes", type=int, help="How many there are, if the data do not say.")
@click.option("--overwrite", is_flag=True, help="Make a finished or begun cache anew.")
def import_labels(**options: Any) -> None:
    """Make a cache of soft targets that you already have; a row for each sample, in the data's order.

    \b
    SOURCE is one of
      FILE.npy, FILE.npz, FILE.pt                     a matrix (samples, classes)
      hfds:ID_OR_FOLDER?ids=COLUMN&log_probs=COLUMN   the largest k of each row, of Hugging Face's
                                                      datasets (softcache[data])
    """
    from softcache.files.import_labels import import_labels
    from softcache.results.tables import cache_line

    click.echo(cache_line(import_labels(**options)))


@main.command("export-labels")
@click.argument("cache", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, metavar="FILE.npy|FILE.parquet")
@click.option("--temperature", type=float, help="[default: the cache's]")
@click.option("--view", type=int, default=0)
@click.option("--log-probabilities", is_flag=True, help="Instead of probabilities.")
def export_labels(cache: Path, out: Path, **options: Any) -> None:
    """Write the soft targets of one view: an .npy matrix (samples, classes) float32, or Parquet.

    A row of Parquet (softcache[data]) holds sample, label, key and the list of probabilities. The other
    way, softcache import makes a cache of a matrix.
    """
    from softcache.files.export_labels import export_labels

    click.echo(export_labels(cache, out, **options))


@main.command()
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option("--eval-data", metavar="SPEC", help="Test error and calibration on these.")
@click.option("--cache", type=PATH, help="KL to the teacher on the samples of this cache.")
@click.option("--data", metavar="SPEC", help="These samples, if the cache does not hold them.")
@click.option(
    "--student", multiple=True, metavar="SPEC", help="Where code of students is, if not built-in."
)
def compare(runs: tuple[Path, ...], **options: Any) -> None:
    """Show students side by side: size, multiply-adds, latency on the CPU, error, calibration."""
    from softcache.results.compare import compare

    click.echo(compare(runs, **options))


@main.command()
@click.argument("places", type=PATH, nargs=-1, required=True, metavar="CACHE|RUN...")
@click.option("-o", "--out", type=PATH, default=Path("report.html"), help="The page to write.")
@click.option("--data", metavar="SPEC", help="Samples of the cache, if it does not hold them.")
@click.option("--eval-data", metavar="SPEC", help="Measure students on these.")
@click.option(
    "--student", multiple=True, metavar="SPEC", help="Where code of students is, if not built-in."
)
def report(places: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write one HTML page, with all pictures in it, about caches and finished runs.

    Of a cache: what the teacher sees in each class, how sure it is, its calibration, the samples it is
    least sure of. Of runs: curves, gains over hard labels, accuracy against cost, and measured answers
    to why it works. Needs softcache[report].
    """
    from softcache.results.report import report

    click.echo(f"{report(places, out, **options)}: open it in a browser")


@main.command()
@click.option("--data-dir", type=PATH, default=Path("data"), help="The project's data folder.")
@click.option("--out", type=PATH, default=Path("runs/demo"), help="Where the demo writes.")
@click.option("--seed", type=int, default=0, help="Of the student.")
def demo(data_dir: Path, out: Path, seed: int) -> None:
    """From a trained teacher to a distilled student on MNIST, in a few minutes."""
    from softcache.cli.demo import demo_commands

    for arguments in demo_commands(data_dir, out, seed):
        click.secho(f"\n$ softcache {shlex.join(arguments)}", bold=True)
        sys.stdout.flush()
        failed = main.main(arguments, prog_name="softcache", standalone_mode=False)
        if failed:
            raise click.exceptions.Exit(failed)

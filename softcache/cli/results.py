"""Commands for trained students: compare, report, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from softcache.cli.commands import PATH, Command, Decorator, option, out_option, settings_options
from softcache.train.config import TrainConfig


def student_option() -> Decorator:
    """The option `--student`, for students whose run folder does not say where their code is."""
    return option(
        "--student",
        multiple=True,
        metavar="SPEC",
        help="Specification of a student whose code is your own, with the path to its file.",
    )


@click.command(cls=Command)
@click.argument("runs", type=PATH, nargs=-1, required=True)
@option("--eval-data", metavar="SPEC", help="Labelled data on which to measure test error and ECE.")
@option("--cache", type=PATH, help="Cache on which to measure the KL to the teacher.")
@option("--data", metavar="SPEC", help="Samples of --cache, if it does not store them.")
@student_option()
@settings_options(TrainConfig, only=("same_classes", "trust_code", "strict"))
def compare(runs: tuple[Path, ...], **options: Any) -> None:
    """Compare students: size, MACs, latency on the CPU, test error, KL to the teacher, calibration (ECE)."""
    from softcache.results.compare import compare

    click.echo(compare(runs, **options))


@click.command(cls=Command)
@click.argument("places", type=PATH, nargs=-1, required=True, metavar="CACHE|RUN...")
@out_option("HTML page to write.", required=False, default=Path("report.html"), show_default=True)
@option("--data", metavar="SPEC", help="Samples of the cache, if it does not store them.")
@option("--eval-data", metavar="SPEC", help="Labelled data on which to evaluate the students.")
@student_option()
@settings_options(TrainConfig, only=("same_classes", "trust_code", "strict"))
def report(places: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write a report on caches and finished runs: one HTML page that contains all figures.

    It opens with a verdict: how good the teacher is, how much of it the cache keeps, and what each
    student gained over its hard-label baseline. Needs the report extra.
    """
    from softcache.results.report import report

    click.echo(f"{report(places, out, **options)}: open it in a browser")


@click.command(cls=Command)
@click.argument("run", type=PATH)
@option("--onnx", is_flag=True, help="Write RUN/student.onnx (onnx extra).")
@option("--pt2", is_flag=True, help="Write RUN/student.pt2, a torch.export program.")
@option("--hf", is_flag=True, help="Write RUN/student-hf, a folder that transformers loads.")
@student_option()
@settings_options(TrainConfig, only=("trust_code",))
def export(run: Path, **options: Any) -> None:
    """Export the student of a run, and check that each file returns the student's logits.

    ONNX and pt2 take (B, *shape) float32, images in [0, 1], and return logits (B, classes) for any B.
    """
    from softcache.results.export import export_student

    for path in export_student(run, **options):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        click.echo(f"{path}: {size:,} bytes, same logits as the student")

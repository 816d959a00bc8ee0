"""`softcache demo`: dump, inspect and train on the project's own data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from softcache.cli.commands import PATH, Command, option, out_option
from softcache.cli.demo_commands import FEW_LABELS, demo_commands


@click.command(cls=Command)
@option(
    "--data-dir",
    type=PATH,
    default=Path("data"),
    show_default=True,
    help="Data folder of a clone of the project.",
)
@out_option("Folder to write to.", required=False, default=Path("runs/demo"), show_default=True)
@option("--seed", type=int, default=0, show_default=True, help="Seed of the student.")
@click.pass_context
def demo(ctx: click.Context, data_dir: Path, out: Path, seed: int) -> None:
    """Distil a student on MNIST from a trained teacher, in a few minutes."""
    main = ctx.find_root().command
    for arguments in demo_commands(data_dir, out, seed):
        click.secho(f"\n$ softcache {shlex.join(arguments)}", bold=True)
        sys.stdout.flush()
        code = main.main(arguments, prog_name="softcache", standalone_mode=False)
        if code:
            raise click.exceptions.Exit(code)
    click.echo(
        f"\nThe student of the last run had {FEW_LABELS} labelled images; the distilled student has learned "
        "from soft targets alone, without a single label."
    )

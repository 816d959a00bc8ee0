"""The `softcache` command and its sub-commands."""

from __future__ import annotations

import click

from softcache._version import __version__
from softcache.cli.commands import CONTEXT, Commands
from softcache.cli.demo import demo
from softcache.cli.dump import dump
from softcache.cli.files import export_labels, import_labels, info, merge, repair, verify
from softcache.cli.help_specs import help_command
from softcache.cli.results import compare, export, report
from softcache.cli.share import pull, push
from softcache.cli.train import train


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, package_name="softcache")
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
def main(traceback: bool) -> None:
    """Run the teacher once: cache its soft targets in one file, distil any number of students from it."""


for command in (
    demo, dump, train, info, verify, repair, merge, pull, push, import_labels, export_labels, compare,
    report, export, help_command,
):  # fmt: skip
    main.add_command(command)

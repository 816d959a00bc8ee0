"""`softcache dump`: write a teacher's soft targets into a cache."""

from __future__ import annotations

from typing import Any

import click

from softcache.cli.commands import OUTPUT, Command, option, settings_options
from softcache.dump.config import DumpConfig
from softcache.util.distributed import rank


@click.command(cls=Command)
@settings_options(DumpConfig)
@option(
    "--dry-run",
    is_flag=True,
    group=OUTPUT,
    help="Report size, time and the KL of every encoding; write nothing.",
)
def dump(dry_run: bool, **options: Any) -> None:
    """Write a teacher's soft targets for every sample into one file.

    A dump that was stopped continues when the same command is run again. Until the cache is complete,
    it is called FILE.partial.

    Several GPUs on one host fill one file: torchrun --nproc-per-node N -m softcache dump … Several
    hosts each dump a --shard, and softcache merge joins them.

    For the forms of SPEC (teachers, data, augmentations, encodings), see softcache help specs.
    """
    options["first_view"], options["views"] = options["views"]
    config = DumpConfig(**options)
    if dry_run:
        from softcache.dump.dry_run import dry_run as estimate

        line = estimate(config)
    else:
        from softcache.dump.loop import dump
        from softcache.files.describe import cache_line

        line = cache_line(dump(config))
    if rank() == 0:
        click.echo(line)

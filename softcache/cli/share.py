"""Commands for sharing caches: pull and push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from softcache.cli.commands import OUTPUT, PATH, Command, option, out_option
from softcache.cli.params import Numbers


@click.command(cls=Command)
@click.argument("source", metavar="URL|PATH")
@option("--views", type=Numbers(), metavar="A:B", help="Fetch only views A to B - 1.")
@option("--samples", type=Numbers(), metavar="A:B", help="Fetch only samples A to B - 1.")
@option("--expect", metavar="CONTENT_ID", help="Fail unless the cache has this content id.")
@out_option("Cache file to write.", metavar="FILE")
@option(
    "--overwrite",
    is_flag=True,
    group=OUTPUT,
    help="Replace an existing file, or a pull that was started with other options.",
)
def pull(source: str, **options: Any) -> None:
    """Fetch a cache, or a part of it, from a server or a disk.

    URL is http:// or https:// (remote extra), s3:// (s3 extra), gs:// (gcs extra) or hf:// (hub extra).
    Byte ranges are fetched in parallel, and every block is checked against its digest as it arrives.
    A pull that was stopped continues when the same command is run again.
    """
    from softcache.files.describe import cache_line
    from softcache.files.pull import pull

    click.echo(cache_line(pull(source, **options)))


@click.command(cls=Command)
@click.argument("cache", type=PATH)
@click.argument("url", metavar="URL|PATH")
@option("--overwrite", is_flag=True, help="Replace another file at URL.")
def push(cache: Path, url: str, overwrite: bool) -> None:
    """Copy a cache and a card (README.md) to a URL (s3://, gs://, hf://) or a path.

    The cache is verified first; afterwards its header and digests are read back.
    """
    from softcache.files.push import push

    click.echo(push(cache, url, overwrite=overwrite))

"""`softcache train`: train students from a cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from softcache.cli.commands import Command, option, settings_options
from softcache.cli.params import read_config
from softcache.train.config import STUDENT, StudentConfig, TrainConfig
from softcache.train.options import make_train_config
from softcache.util.distributed import rank


@click.command(cls=Command)
@click.argument("cache", nargs=-1, metavar="[CACHE|URL]...")
@settings_options(StudentConfig, TrainConfig, repeatable=("student",))
@option(
    "--grid",
    multiple=True,
    metavar="NAME=A,B",
    group=STUDENT,
    help="Train one student for each value of a setting, or for each combination if repeated.",
)
@option(
    "--config",
    "tables",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    callback=read_config,
    metavar="TOML",
    group=STUDENT,
    help="Read options from a file; each [[student]] table has the settings of one student.",
)
def train(cache: tuple[str, ...], **options: Any) -> None:
    """Train students from CACHE; without CACHE, train a model on labels alone.

    A URL is first pulled into $XDG_CACHE_HOME/softcache (by default ~/.cache/softcache).

    With several caches, such as labelled and unlabelled samples, or the shards of a dump, each batch is
    drawn from the samples of all of them. The complete views of an unfinished FILE.partial can be trained
    from, if its first view is among them.

    A run that was stopped continues from its last checkpoint when the same command is run again.

    The loss is alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy with the labels; --loss
    replaces the KL. For the losses and the forms of SPEC, see softcache help specs.
    """
    from softcache.files.local_copy import local_copy
    from softcache.train.grid import make_variants
    from softcache.train.loop import train

    most_views = None if options["rotate"] else options["epochs"]
    paths = [local_copy(source, most_views=most_views) for source in cache]
    variants = make_variants(*(options.pop(name) for name in ("student", "grid", "tables")))
    train(make_train_config(students=variants, cache=paths, **options))
    if rank() > 0:
        # this process has written nothing, and threads of torch's process group that outlive Python would
        # abort it now and then, and with it the whole run
        sys.stderr.flush()
        os._exit(0)

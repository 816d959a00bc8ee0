"""`softcache train`: a cache becomes students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from softcache.cli.commands import Command, option, settings_options
from softcache.cli.params import read_config
from softcache.train.config import STUDENT, StudentConfig, TrainConfig, make_train_config


@click.command(cls=Command)
@click.argument("cache", nargs=-1, metavar="[CACHE|URL]...")
@settings_options(StudentConfig, TrainConfig, repeatable=("student",))
@option(
    "--grid",
    multiple=True,
    metavar="NAME=A,B",
    group=STUDENT,
    help="Train a student for each value of a setting, or for each combination of several.",
)
@option(
    "--config",
    "tables",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    callback=read_config,
    metavar="TOML",
    group=STUDENT,
    help="Read options from a file; its [[student]] tables hold the settings of single students.",
)
def train(cache: tuple[str, ...], **options: Any) -> None:
    """Train students from CACHE; without CACHE, train a model on labels alone.

    A URL is first pulled into the folder softcache in $XDG_CACHE_HOME (by default ~/.cache).

    With several caches, each batch is drawn from all samples alike: labelled and unlabelled ones, or
    the shards of a dump. The complete views of an unfinished FILE.partial can be trained on.

    A run that was stopped continues from its last checkpoint when the same command is run again.

    The loss is alpha T² KL(teacher ‖ student) + (1 - alpha) cross-entropy with the labels; --loss
    replaces the KL. The forms of SPEC and the losses: softcache help specs.
    """
    from softcache.files.pull import local_copy
    from softcache.train.grid import make_variants
    from softcache.train.loop import train

    most_views = None if options["rotate"] else options["epochs"]
    paths = [local_copy(place, most_views=most_views) for place in cache]
    variants = make_variants(*(options.pop(name) for name in ("student", "grid", "tables")))
    train(make_train_config(students=variants, cache=paths, **options))

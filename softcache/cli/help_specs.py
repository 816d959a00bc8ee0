"""`softcache help`: the forms of specifications, from the tables of the modules that parse them."""

from __future__ import annotations

from collections.abc import Iterable

import click

from softcache.cli.commands import Command

TOPICS = ("specs",)


@click.command("help", cls=Command)
@click.argument("topic", type=click.Choice(TOPICS), required=False)
@click.pass_context
def help_command(ctx: click.Context, topic: str | None) -> None:
    """Show help on a topic: specs lists the forms of every SPEC."""
    if topic is None:
        click.echo(ctx.find_root().get_help())
        click.echo(f"\nTopics: {', '.join(TOPICS)}")
        return
    click.echo(specs_page())


def specs_page() -> str:
    """A page with every form of every SPEC."""
    from softcache.cache.encodings import ENCODINGS
    from softcache.data.augmentations import OPERATIONS
    from softcache.data.spec import KINDS as DATA_KINDS
    from softcache.losses import LOSSES
    from softcache.models.spec import KINDS as MODEL_KINDS
    from softcache.teachers.spec import ALL_KINDS as TEACHER_KINDS

    def entries(kinds: Iterable[object]) -> list[tuple[str, str]]:
        return [(getattr(kind, "form", ""), getattr(kind, "meaning", "")) for kind in kinds]

    sections = {
        "Teachers (--teacher)": entries(TEACHER_KINDS.values()),
        "Students (--student)": entries(MODEL_KINDS.values()),
        "Data (--data, --eval-data), each with @SPLIT at the end if needed (default: train)": entries(
            DATA_KINDS.values()
        ),
        "Options follow a ?, separated by &": [
            (
                "DATA?classes=A,B&shuffle=SEED&samples=N",
                "any data: the names of labels 0, 1, …; a random order; the first N samples of it",
            ),
            (
                "folder:DIR?size=256&mode=RGB",
                "resize the shorter side to 256 and crop the central square, or size=192x256; depth=16 for "
                "16-bit images, unreadable=skip to leave out files that are no images",
            ),
            (
                "folder:DIR?masks=DIR2",
                "images with a class for each pixel: DIR2 has a mask of the same name for each, paletted or "
                "8-bit grey, 255 for none",
            ),
            (
                "hfds:ID?input=COLUMN&label=COLUMN&name=CONFIG@test[:1000]",
                "names of columns, configuration, slice of the split",
            ),
            (
                "text:FILE?tokenizer=ID_OR_FOLDER&length=1024&stride=512",
                "texts, chats, words and ids: the tokenizer, by default the model's; the most tokens of a "
                "sample, and from one to the next; loss_on=all, assistant or completion for chats",
            ),
            (
                "csv:FILE?label=COLUMN&inputs=A,B&missing=mean",
                "names of columns; missing=nan or mean for empty cells",
            ),
            (
                "MODEL?normalize=imagenet, or mean=M,M,M&std=S,S,S",
                "any teacher or student of images but hf: and timm:, which have their own: normalizes inputs "
                "in [0, 1], channel by channel",
            ),
            ("%3F, %40 and %25 in a place", "for ?, @ and % in the name of a file or folder"),
            ("TEACHER?classes=A,B,C", "any teacher: the names of its outputs, in order"),
            (
                "openai:URL?model=NAME&top=K&key_env=VARIABLE",
                "concurrency=8 documents at a time, per_minute= requests, retries=5, timeout=600 seconds; "
                "the key is in an environment variable",
            ),
            ("hf:vit?pretrained=false&hidden_size=192", "a student with random weights"),
            ("hf:FOLDER?tokenizer=ID_OR_FOLDER", "or processor=, if it is in another folder"),
        ],
        "Augmentations (--augment, --extra-augment), one or more, separated by commas": [
            (
                "FILE.py:CALLABLE",
                "your own, in first place: takes and returns one raw sample; randomness is seeded",
            ),
            *entries(OPERATIONS.values()),
            ("mixup", "in last place: mixes in another sample, with a uniform lambda"),
        ],
        "Encodings (--encoding)": [
            *entries(ENCODINGS.values()),
            (
                "auto",
                "the smallest encoding whose KL, measured on the teacher, is at most --max-kl",
            ),
        ],
        "Losses (--loss)": entries(LOSSES.values()),
    }
    formatter = click.HelpFormatter(max_width=100)
    for title, rows in sections.items():
        with formatter.section(title):
            formatter.write_dl(rows, col_max=34)
    return formatter.getvalue().rstrip()

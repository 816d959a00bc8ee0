"""README and guide: commands parse, links lead somewhere, the pages ship, and the README stays short."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import click
import pytest

from softcache.cli.app import main
from softcache.cli.commands import RENAMED
from softcache.data.spec import parse_data
from softcache.dump.config import DumpConfig
from softcache.errors import SettingsError
from softcache.models.spec import parse_model
from softcache.teachers.spec import parse_teacher
from softcache.train.grid import make_variants
from softcache.train.options import make_train_config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "softcache" / "guide"
PAGES = sorted(GUIDE.glob("*.md"))
DOCUMENTS = [
    README,
    *PAGES,
    ROOT / "data" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
]
LINKED = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "tests" / "bench" / "README.md"]
MAX_WORDS = 800

PROGRAMS = ("softcache", "torchrun", "python", "pip")
ELIDED = re.compile(r"…|\.\.\.")
NOT_OURS = {"--nproc-per-node", "--standalone", "--array", "--gpus-per-node", "--requeue"}


def indented_lines(text: str) -> list[str]:
    """The lines of indented code, without fenced blocks; continued lines are joined."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    code = "\n".join(re.findall(r"^ {4,}(.*)$", text, re.MULTILINE))
    return re.sub(r"\\\n\s*", "", code).splitlines()


def commands(text: str) -> list[list[str]]:
    """The arguments of every `softcache` command line that leaves nothing out."""
    found = []
    for line in indented_lines(text):
        for part in line.split("&&"):
            if ELIDED.search(part) or not part.strip().startswith(PROGRAMS):
                continue
            words = shlex.split(part.replace("$SLURM_ARRAY_TASK_ID", "0"), comments=True)
            if words[0] == "softcache":
                found.append(words[1:])
            elif words[0] == "torchrun":
                found.append(words[words.index("softcache") + 1 :])
    return found


def check_command(arguments: list[str]) -> None:
    """Parse a command line as `softcache` itself does; nothing is run."""
    renamed = set(RENAMED) & set(arguments)
    assert not renamed, f"{renamed} have other names now"
    if arguments[0] == "--help":
        return
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None, f"there is no softcache {arguments[0]}"
    try:
        options = dict(command.make_context(arguments[0], arguments[1:]).params)
    except click.exceptions.Exit:  # --help
        return
    if command.name == "dump":
        check_dump(options)
    if command.name == "train":
        check_train(options)


def check_dump(options: dict[str, Any]) -> None:
    """Make the settings of a dump, and take its specifications apart."""
    options["first_view"], options["views"] = options["views"]
    del options["dry_run"]
    config = DumpConfig(**options)
    parse_data(config.data)
    for teacher in config.teachers:
        parse_teacher(teacher)


def check_train(options: dict[str, Any]) -> None:
    """Make the settings of a training run, and take its specifications apart."""
    variants = make_variants(*(options.pop(name) for name in ("student", "grid", "tables")))
    config = make_train_config(students=variants, **options)
    for data in config.data:
        parse_data(data)
    for student in config.students:
        parse_model(student.student)


def opening(text: str) -> str:
    """The first line below the title, if it is a command; else an empty text."""
    lines = text.split("\n")
    below = next((line for line in lines[1:] if line.strip()), "")
    is_command = below.startswith("    ") and below.split()[0] in PROGRAMS
    return below.strip() if lines[0].startswith("# ") and is_command else ""


def spans(text: str) -> list[str]:
    """The inline code of a document."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def unknown_options(text: str) -> set[str]:
    """The options in inline code that no command has."""
    known = {name for command in main.commands.values() for p in command.params for name in p.opts}
    known |= {
        name
        for command in main.commands.values()
        for p in command.params
        for name in p.secondary_opts
    }
    known |= {"--help"}
    written = {
        name for span in spans(text) for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
    }
    return written - known - NOT_OURS


def unknown_commands(text: str) -> set[str]:
    """The commands in inline code that do not exist."""
    written = {span.split()[1] for span in spans(text) if re.match(r"softcache [a-z]", span)}
    return written - set(main.commands)


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    return [target for target in local if target and not (page.parent / target).exists()]


def excess_words(text: str) -> int:
    """How many words, as `wc -w` counts them, a README has too many."""
    return max(0, len(text.split()) - MAX_WORDS)


def unshipped(pages: list[Path], patterns: list[str]) -> list[str]:
    """The pages that are not package data."""
    names = [page.relative_to(ROOT / "softcache").as_posix() for page in pages]
    return [name for name in names if not any(fnmatch.fnmatch(name, p) for p in patterns)]


def name_of(document: Path) -> str:
    """A short name that no other document has."""
    return document.relative_to(ROOT).with_suffix("").as_posix().removeprefix("softcache/")


COMMANDS = [
    pytest.param(arguments, id=f"{name_of(document)}-{number}")
    for document in DOCUMENTS
    for number, arguments in enumerate(commands(document.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_command_parses(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = re.search(r"^```toml\n(.*?)^```", (GUIDE / "students.md").read_text(), re.M | re.S)
    assert example
    (tmp_path / "run.toml").write_text(example[1])
    monkeypatch.chdir(tmp_path)
    check_command(arguments)


def test_every_document_with_commands_is_checked() -> None:
    counts = {
        name_of(document): len(commands(document.read_text(encoding="utf-8")))
        for document in DOCUMENTS
    }
    without = {name for name, count in counts.items() if not count}
    assert without == {
        "guide/comparison", "guide/python", "guide/what-was-measured", "CONTRIBUTING", "SECURITY",
    }  # fmt: skip
    assert counts["README"] >= 3


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("softcache dump --teach x", click.NoSuchOption, "--teach"),
        ("softcache dump --data npz:x.npz --out c.h5", click.MissingParameter, "teacher"),
        ("softcache dumb cache.h5", AssertionError, "no softcache dumb"),
        ("softcache train c.h5 --student mlp:8 --clip 1 --out run", AssertionError, "other names"),
        (
            "torchrun --nproc-per-node 2 -m softcache merge a.h5",
            click.MissingParameter,
            "out",
        ),
        (
            "softcache train c.h5 --student mlp:8 --grid speed=1,2 --data npz:x.npz --out run",
            SettingsError,
            "'speed' is not a setting of a student",
        ),
        (
            "softcache train c.h5 --student mlp:8 --data zip:x.zip --out run",
            SettingsError,
            "unknown kind 'zip'",
        ),
        (
            "softcache dump --teacher a.py:b --data npz:x.npz --views 4 --out c.h5",
            SettingsError,
            "4 views without --augment",
        ),
    ],
)
def test_a_wrong_command_is_noticed(line: str, error: type[Exception], message: str) -> None:
    (arguments,) = commands(f"# Title\n\n    {line}\n")
    with pytest.raises(error, match=message):
        check_command(arguments)


def test_command_lines_are_found_whole() -> None:
    text = (
        "    pip install . && softcache demo\n\n"
        "    softcache merge a.h5 \\\n        b.h5 --out c.h5  # both\n\n"
        "    softcache dump … --out a.h5\n    softcache dump ... --out a.h5\n\n"
        "    torchrun -m softcache dump --shard $SLURM_ARRAY_TASK_ID/16\n\n"
        "softcache in a sentence\n\n```python\n    softcache.dump()\n```\n"
    )
    assert commands(text) == [
        ["demo"],
        ["merge", "a.h5", "b.h5", "--out", "c.h5"],
        ["dump", "--shard", "0/16"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_opens_with_a_command(page: Path) -> None:
    line = opening(page.read_text(encoding="utf-8"))
    assert line
    if line.startswith("python -m"):
        assert importlib.util.find_spec(line.split()[2])
    if line.startswith("python -c"):
        compile(shlex.split(line)[2], page.name, "exec")


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n\nFirst a sentence.\n\n    softcache demo\n",
        "# Title\n\n    cd somewhere\n",
        "    softcache demo\n",
        "# Title\n",
    ],
)
def test_a_page_that_opens_otherwise_is_noticed(text: str) -> None:
    assert not opening(text)
    assert opening("# Title\n\n    softcache demo\n") == "softcache demo"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_and_commands_in_sentences_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not unknown_options(text)
    assert not unknown_commands(text)


def test_an_option_or_command_that_does_not_exist_is_noticed() -> None:
    text = "Use `--out`, `--clip 1`, `dump --no-rotate`, `softcache dump` or `softcache dumb`."
    assert unknown_options(text) == {"--clip"}
    assert unknown_commands(text) == {"dumb"}


@pytest.mark.parametrize("document", LINKED, ids=name_of)
def test_relative_links_exist(document: Path) -> None:
    assert not broken_links(document, document.read_text(encoding="utf-8"))


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "there.md").touch()
    text = "[a](there.md#part) [b](gone.md) ![c](gone.png) [d](https://host/x.md) [e](#part)"
    assert broken_links(tmp_path / "page.md", text) == ["gone.md", "gone.png"]


def test_every_page_is_linked_from_the_index() -> None:
    index = (GUIDE / "index.md").read_text(encoding="utf-8")
    missing = {page.name for page in PAGES if f"({page.name})" not in index}
    assert missing == {"index.md"}


def test_the_readme_is_short() -> None:
    assert not excess_words(README.read_text(encoding="utf-8"))


def test_a_readme_that_is_too_long_is_noticed() -> None:
    assert excess_words("one word\n" * 401) == 2
    assert excess_words("one word\n" * 400) == 0


def test_the_readme_shows_the_command_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 -E '([^']+)' README.md", script)
    assert pattern
    (line,) = re.findall(f"{pattern[1]}.*", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert line.strip() == "pip install -c .ci/constraints.txt -e '.[dev]' && pytest -n 2"


def test_the_guide_ships_with_the_package() -> None:
    folder = resources.files("softcache.guide")
    assert {page.name for page in PAGES} <= {entry.name for entry in folder.iterdir()}
    assert folder.joinpath("index.md").read_text(encoding="utf-8").startswith("# ")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    assert fnmatch.fnmatch("softcache.guide", setuptools["packages"]["find"]["include"][0])
    assert not unshipped(PAGES, setuptools["package-data"]["softcache"])


def test_a_page_that_does_not_ship_is_noticed() -> None:
    pages = [GUIDE / "index.md", GUIDE / "index.rst"]
    assert unshipped(pages, ["py.typed", "guide/*.md"]) == ["guide/index.rst"]

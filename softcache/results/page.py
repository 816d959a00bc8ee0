"""The page of a report: its parts, and the HTML made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

from softcache._version import __version__
from softcache.results.figures import as_uri
from softcache.results.verdict import Verdict
from softcache.util.extras import import_extra


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        title: the heading above it.
        uri: the image itself.
        text: what it shows, for readers who cannot see it.
        caption: how to read it, below it.
    """

    title: str
    uri: str
    text: str
    caption: str = ""
    kind: str = "picture"


@dataclass(frozen=True)
class Table:
    """A table; its first `text_columns` columns are text, the others are numbers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Thumbnails:
    """Small images, each with a caption."""

    title: str
    pictures: Sequence[Picture]
    kind: str = "thumbnails"


@dataclass
class Section:
    """A heading and what stands below it; `facts` come last, as preformatted text."""

    title: str
    notes: list[str] = field(default_factory=list)
    blocks: list[Picture | Table | Thumbnails] = field(default_factory=list)
    facts: str = ""

    def add_figure(self, title: str, image: bytes, text: str, caption: str = "") -> None:
        """Append an SVG as a picture."""
        self.blocks.append(Picture(title, as_uri(image), text, caption))


def render(verdict: Verdict, sections: Sequence[Section]) -> str:
    """The HTML of a page; text from files is escaped."""
    jinja = import_extra("jinja2", extra="report", what="softcache report")
    template = (
        resources.files("softcache.results")
        .joinpath("report.html.jinja")
        .read_text(encoding="utf-8")
    )
    environment = jinja.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    page = environment.from_string(template)
    return str(page.render(verdict=verdict, sections=sections, version=__version__))

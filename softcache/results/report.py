"""`softcache report`: what a teacher knows and what its students learned, on one HTML page.

The page is a single file: its images are part of it, nothing is fetched, and no script runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from softcache.cache import Cache
from softcache.cache.reader import open_trainable
from softcache.data.embedded import CacheSource
from softcache.data.source import Source
from softcache.errors import DataError, MissingCacheError, SettingsError
from softcache.join.samples import open_samples
from softcache.results.cache_section import cache_sections
from softcache.results.page import render
from softcache.results.runs_section import runs_section
from softcache.results.verdict import Verdict
from softcache.train.run_folder import expand, open_run
from softcache.util.extras import import_extra
from softcache.util.files import replace_file


def report(
    places: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    eval_data: str | None = None,
    student: Sequence[str] = (),
    same_classes: bool = False,
    trust_code: bool = False,
    strict: bool = False,
) -> Path:
    """Write a page about caches and runs, which `places` name in any order.

    Args:
        places: caches, run folders, and folders of run folders.
        out: the HTML file to write.
        data: the samples of the first cache, if it does not store them.
        eval_data: labelled data on which to evaluate the students; without them, accuracies come from the
            evaluation at the end of training.
        student: specifications of students whose code is the user's own, with the path to their file.
        same_classes: the classes of the evaluation data are those of the students in the same order, whatever
            they are called.
        trust_code: load a student in a .pt2 file even if the file may run code.
        strict: raise an error if a figure cannot be right, and write no page.

    Raises:
        SoftcacheError: a place is neither a cache nor a finished run, the data do not fit, or the extra
            softcache[report] is not installed.
        DataError: with `strict`, a figure cannot be right.
    """
    if not places:
        raise SettingsError("nothing to report; name caches, or run folders of softcache train")
    for module in ("jinja2", "matplotlib"):
        import_extra(module, extra="report", what="softcache report")
    missing = [place for place in places if not place.exists()]
    if missing:
        raise MissingCacheError(
            f"{missing[0]}: no such file or folder; name a cache or a finished run"
        )
    caches = [open_trainable(place) for place in places if not place.is_dir()]
    folders = [place.resolve() for place in expand([p for p in places if p.is_dir()])]
    runs = {
        name: open_run(folder, trust_code=trust_code)
        for name, folder in short_names(folders).items()
    }
    samples = open_samples(caches[0], data, same_classes=same_classes) if data and caches else None
    verdict, sections = Verdict(), []
    for position, cache in enumerate(caches):
        source = samples if position == 0 and samples is not None else _stored_samples(cache)
        sections += cache_sections(cache, source, verdict, several=len(caches) > 1)
    if runs:
        sections.append(
            runs_section(runs, caches, data, eval_data, student, verdict, same_classes=same_classes)
        )
    if strict and verdict.warnings:
        raise DataError(
            f"{verdict.warnings[0]} Leave --strict out to write the report all the same"
        )
    html = render(verdict, sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, lambda path: path.write_text(html, encoding="utf-8"))
    return out


def short_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by as few of their last path components as tell them apart: the page is shared."""
    longest = max((len(folder.parts) for folder in folders), default=1)
    for count in range(1, longest + 1):
        names = {"/".join(folder.parts[-count:]): folder for folder in folders}
        if len(names) == len(set(folders)):
            return names
    return {}


def _stored_samples(cache: Cache) -> Source | None:
    return CacheSource(cache) if cache.header.embeds_inputs else None

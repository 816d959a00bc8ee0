"""The report: one file that says what was measured, and shows in a browser without any network."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.cache import Cache, open_cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, SettingsError
from softcache.results import figures, report
from softcache.train.config import make_train_config
from softcache.train.loop import train
from tests.configs import replace
from tests.conftest import Run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def embedded(dump_config: DumpConfig) -> Cache:
    return dump(replace(dump_config, embed_inputs=True))


@pytest.fixture
def run_folder(embedded: Cache, data_file: Path, tmp_path: Path) -> Path:
    config = make_train_config(
        student="mlp:16", cache=embedded.path, data=(), out=tmp_path / "runs" / "small", epochs=3,
        eval_data=f"npz:{data_file}@test", baseline=True, device="cpu",
    )  # fmt: skip
    train(config)
    return config.out


class Page(html.parser.HTMLParser):
    """Tags, links and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_of_a_cache_and_its_runs(
    embedded: Cache, run_folder: Path, data_file: Path, tmp_path: Path, run: Run
) -> None:
    run("report", embedded.path, run_folder, "--eval-data", f"npz:{data_file}@test", "-o", "r.html",
        check=True)  # fmt: skip
    found = Page(tmp_path / "r.html")
    for title in (
        "What the teacher knows: tiny.h5", "What it sees in each class", "How sure it is",
        "Does it know when it is wrong?", "Most alike", "What it is least sure of", "Curves",
        "Accuracy against cost", "Students", "How alike the gradients of different batches are",
    ):  # fmt: skip
        assert title in found.text, title
    assert found.tags.count("img") == 5 + report.THUMBNAILS
    assert embedded.content_id() in found.text
    assert re.search(r"small\s*mlp:16\s*1,125", found.text)
    assert "small/baseline" in found.text


def test_nothing_is_fetched_run_or_told_of_this_machine(
    embedded: Cache, run_folder: Path, tmp_path: Path
) -> None:
    out = report.report([embedded.path, run_folder], tmp_path / "r.html")
    found, text = Page(out), out.read_text(encoding="utf-8")
    assert found.links
    assert all(link.startswith("data:image/") for link in found.links)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "default-src 'none'" in text
    assert str(tmp_path) not in text


def test_the_same_report_gives_the_same_bytes_but_for_latency(
    embedded: Cache, tmp_path: Path
) -> None:
    one = report.report([embedded.path], tmp_path / "1.html").read_bytes()
    assert report.report([embedded.path], tmp_path / "2.html").read_bytes() == one


def test_names_from_a_file_are_text_and_no_markup(
    dump_config: DumpConfig, data_file: Path, tmp_path: Path
) -> None:
    cache = dump(dump_config)
    forged = replace(
        cache,
        arrays=dict(cache.arrays)
        | {"class_names": np.array([b"<script>alert(1)</script>", b"a&b", b"c", b"d", b"e"])},
    )
    section = report.cache_section(forged, None)
    assert any("<script>" in cell for table in section.tables for row in table.rows for cell in row)
    out = tmp_path / "r.html"
    jinja = pytest.importorskip("jinja2")
    text = (Path(report.__file__).parent / "report.html.jinja").read_text()
    template = jinja.Environment(autoescape=True).from_string(text)
    out.write_text(template.render(sections=[section], version="1"))
    assert "script" not in Page(out).tags


@pytest.mark.parametrize("encoding", ["dense", "quantized", "topk:2", "basis:4,2", "sampled:9"])
def test_every_encoding_has_a_page(encoding: str, dump_config: DumpConfig, tmp_path: Path) -> None:
    cache = dump(replace(dump_config, encoding=encoding, views=2, augment="shift:1"))
    found = Page(report.report([cache.path], tmp_path / "r.html"))
    calibrated = "Does it know when it is wrong?" in found.text
    assert calibrated == (encoding != "sampled:9")  # which has its own temperature only


def test_unlabelled_data_and_own_samples(dump_config: DumpConfig, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", x=images)
    (tmp_path / "m.py").write_text(
        "from torch import nn\n\ndef wide():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))\n"
    )
    bare = f"npz:{tmp_path / 'bare.npz'}"
    teacher = f"{tmp_path / 'm.py'}:wide"
    cache = dump(replace(dump_config, data=bare, teacher=teacher, eval_data=None))
    without = Page(report.report([cache.path], tmp_path / "r.html"))
    assert "What it is least sure of" not in without.text
    assert "Does it know when it is wrong?" not in without.text
    found = Page(report.report([cache.path], tmp_path / "r.html", data=bare))
    assert found.tags.count("img") == 2 + report.THUMBNAILS


def test_many_classes_show_those_it_is_least_sure_of(
    embedded: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_CLASSES", 3)
    found = Page(report.report([embedded.path], tmp_path / "r.html"))
    assert "The map shows the 3 classes it is least sure of." in found.text


def test_a_twin_is_found_wherever_it_lies(embedded: Cache, data_file: Path, tmp_path: Path) -> None:
    """The students of a grid share one."""
    config = make_train_config(
        student="mlp:16", cache=embedded.path, data=(), out=tmp_path / "grid", epochs=1, baseline=True,
        eval_data=f"npz:{data_file}@test", students=[{"alpha": 0.5}, {"alpha": 1.0}], device="cpu",
    )  # fmt: skip
    train(config)
    found = Page(report.report([config.out], tmp_path / "r.html"))
    gains = re.findall(r"alpha=([\d.]+)\s*mlp:16[^%]*%\s*([+-][\d.]+ points)", found.text)
    assert [alpha for alpha, _ in gains] == ["0.5", "1.0"]


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert list(report.short_names(folders)) == ["a/run", "b/run"]
    assert list(report.short_names([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]


def test_what_cannot_be_reported_is_told(
    embedded: Cache, run_folder: Path, tmp_path: Path, without: Callable[[str], None]
) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(
        FormatError, match=r"nowhere: no such file or folder; name a cache or a fini"
    ):
        report.report([tmp_path / "nowhere"], out)
    with pytest.raises(
        SettingsError, match=r"is no finished run: it has no student\.safetensors; name"
    ):
        report.report([tmp_path], out)
    with pytest.raises(SettingsError, match="nothing to report of"):
        report.report([], out)
    without("matplotlib")
    with pytest.raises(
        SettingsError, match=r"needs matplotlib .*; pip install 'softcache\[report\]'"
    ):
        report.report([embedded.path], out)
    assert not out.exists()


def test_thumbnails_are_made_of_images_only() -> None:
    random = np.random.default_rng(0)
    for shape in ((1, 8, 8), (8, 8), (3, 8, 8)):
        assert figures.thumbnail(random.integers(0, 256, shape, dtype=np.uint8))
        assert figures.thumbnail(random.random(shape).astype(np.float32))
    for odd in (random.random(64), random.random((5, 8, 8)), random.normal(size=(8, 8))):
        assert figures.thumbnail(odd) is None


# in a browser


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_it_shows_in_a_browser(embedded: Cache, run_folder: Path, tmp_path: Path) -> None:
    out = report.report([embedded.path, run_folder], tmp_path / "r.html")
    browser = next(found for found in map(shutil.which, BROWSERS) if found)
    shot = tmp_path / "shot.png"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}",
         "--window-size=1000,3400", f"--user-data-dir={tmp_path / 'browser'}", out.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (3400, 1000, 3)
    colours = {tuple(colour) for colour in pixels[::5, ::5].reshape(-1, 3).tolist()}
    assert len(colours) > 100  # the heat map is there
    assert any(abs(r - 0x1B) < 4 and abs(g - 0x6C) < 4 and abs(b - 0xA8) < 4 for r, g, b in colours)


def test_a_cache_that_was_opened_is_left_as_it_was(embedded: Cache, tmp_path: Path) -> None:
    before = embedded.path.read_bytes()
    report.report([embedded.path], tmp_path / "r.html")
    assert embedded.path.read_bytes() == before
    assert open_cache(embedded.path).complete

"""The report: one file that opens with its verdict, and shows in a browser without any network."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.cache import Cache, open_cache
from softcache.cache.reader import open_trainable
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, FormatError, SettingsError
from softcache.results import knowledge, report
from softcache.results.cache_section import THUMBNAILS, cache_sections
from softcache.results.page import Section, Table, render
from softcache.results.verdict import Verdict
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.run_folder import open_run
from tests.configs import replace
from tests.conftest import Run
from tests.results.run_cases import ORIGINAL, copy_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(html.parser.HTMLParser):
    """Tags, links, text, and tables as lists of rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags[-1:] and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())


def test_a_page_of_a_cache_and_its_runs(
    embedded: Cache, grid: Path, data_file: Path, tmp_path: Path, run: Run
) -> None:
    run("report", embedded.path, grid, "--eval-data", f"npz:{data_file}@test", "-o", "r.html",
        check=True)  # fmt: skip
    page = Page(tmp_path / "r.html")
    for title in (
        "What the teacher knows: tiny.h5", "How sure it is", "Confidence and accuracy",
        "Classes that look alike", "Samples it is least sure of", "What the file keeps: tiny.h5",
        "What the students learned", "Learning curves", "Accuracy against cost", "Students", "Runs",
        "How similar the gradients of batches are",
    ):  # fmt: skip
        assert title in page.text, title
    assert page.tags.count("img") == 6 + THUMBNAILS
    assert embedded.content_id() in page.text
    for row in page.rows:
        if row[0] == "mlp:16":
            assert row[1:4] == ["3", "1,125", "1,104"]
    assert sum(row[0] == "mlp:16" for row in page.rows) == 1


def test_the_page_opens_with_its_verdict(embedded: Cache, grid: Path, tmp_path: Path) -> None:
    words = Page(report.report([embedded.path, grid], tmp_path / "r.html")).words
    verdict, _, rest = words.partition("What the teacher knows: tiny.h5")
    assert "The teacher is models.py:teacher (325 parameters)." in verdict
    assert "tiny.h5 stores one view of 300 samples" in verdict
    assert "2 distilled students (6 runs): " in verdict
    assert verdict.count("its hard-label baseline (") == 2
    assert "tiny.h5: the teacher agrees with" in verdict  # its labels are not those of the data
    assert "hard-label baseline (" not in rest


def test_the_teacher_has_a_row_in_every_table(
    embedded: Cache, grid: Path, data_file: Path, tmp_path: Path
) -> None:
    page = Page(report.report([embedded.path, grid], tmp_path / "r.html"))
    assert page.tags.count("table") == 2
    teachers = [row for row in page.rows if row[0] == "teacher: models.py:teacher"]
    assert embedded.header.evaluation is not None
    accuracy = f"{100 - embedded.header.evaluation['errors']:.2f}%"
    assert len(teachers) == 2
    assert all(accuracy in row for row in teachers)
    assert teachers[0][2] == "325"
    # its accuracy is that of other data than these
    np.savez(
        tmp_path / "other.npz", **{key: np.load(data_file)[f"{key}_test"][:50] for key in "xy"}
    )
    page = Page(
        report.report(
            [embedded.path, grid], tmp_path / "r.html", eval_data=f"npz:{tmp_path / 'other.npz'}"
        )
    )
    teachers = [row for row in page.rows if row[0] == "teacher: models.py:teacher"]
    assert len(teachers) == 2
    assert not any("%" in cell for row in teachers for cell in row)


def test_the_table_of_students_has_means_and_gains(grid: Path, tmp_path: Path) -> None:
    for seed, (ours, hard) in enumerate(((10, 20), (12, 21), (14, 25))):
        copy_run(grid, tmp_path / "runs" / f"soft-{seed}", errors=ours, seed=seed)
        copy_run(grid, tmp_path / "runs" / f"hard-{seed}", errors=hard, seed=seed, baseline=True)
    page = Page(report.report([tmp_path / "runs"], tmp_path / "r.html"))
    (student,) = [row for row in page.rows if row[0] == "mlp:8"]
    (baseline,) = [row for row in page.rows if row[0] == "mlp:8, hard labels"]
    assert (student[1], student[5:]) == ("3", ["88.00 ± 2.00%", "+10.00 ± 0.58"])
    assert (baseline[1], baseline[5]) == ("3", "78.00 ± 2.65%")
    assert [row[-1] for row in page.rows if row[0].startswith("soft-")] == [
        "90.00%",
        "88.00%",
        "86.00%",
    ]
    assert "1 distilled student (3 runs): it beats its hard-label baseline." in page.words


def test_a_single_seed_has_no_spread_and_no_table_of_runs(grid: Path, tmp_path: Path) -> None:
    copy_run(grid, tmp_path / "soft", errors=21)
    copy_run(grid, tmp_path / "soft" / "baseline", errors=20, baseline=True)
    page = Page(report.report([tmp_path / "soft"], tmp_path / "r.html"))
    assert page.tags.count("table") == 1
    (student,) = [row for row in page.rows if row[0] == "mlp:8"]
    assert student[5:] == ["79.00%", "\N{MINUS SIGN}1.00 ± 5.71"]
    assert "it did not beat its hard-label baseline" in page.words


def test_nothing_is_fetched_run_or_told_of_this_machine(
    embedded: Cache, grid: Path, tmp_path: Path
) -> None:
    out = report.report([embedded.path, grid], tmp_path / "r.html")
    page, text = Page(out), out.read_text(encoding="utf-8")
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in text
    assert str(embedded.path.parent) not in text
    assert str(grid.parent) not in text


def test_the_same_report_has_the_same_bytes_but_for_latency(
    embedded: Cache, tmp_path: Path
) -> None:
    first = report.report([embedded.path], tmp_path / "1.html").read_bytes()
    assert report.report([embedded.path], tmp_path / "2.html").read_bytes() == first


def test_names_from_a_file_are_text_and_no_markup(cache: Cache, tmp_path: Path) -> None:
    names = [b"<script>alert(1)</script>", b"a&b", b"$x_1$", b"d", b"e"]
    forged = replace(cache, arrays=dict(cache.arrays) | {"class_names": np.array(names)})
    sections = cache_sections(forged, None, Verdict())
    sections.append(
        Section("x", blocks=[Table("t", ("<script>",), [("<script>alert(2)</script>",)])])
    )
    verdict = Verdict(["<script>1"], [("<script>2", "<script>3")], ["<script>4"], "<script>5")
    out = tmp_path / "r.html"
    out.write_text(render(verdict, sections), encoding="utf-8")
    page = Page(out)
    assert "script" not in page.tags
    assert all(f"<script>{number}" in page.text for number in range(1, 6))
    assert "<script>alert(2)</script>" in page.text
    assert "$x_1$" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["dense", "quantized", "topk:2", "basis:4,2", "sampled:9"])
def test_every_encoding_has_a_page(encoding: str, dump_config: DumpConfig, tmp_path: Path) -> None:
    cache = dump(replace(dump_config, encoding=encoding, views=2, augment="shift:1"))
    page = Page(report.report([cache.path], tmp_path / "r.html"))
    calibrated = "Confidence and accuracy" in page.text
    assert calibrated == (encoding != "sampled:9")  # which has its own temperature only
    assert "What more views add" in page.text
    assert ("the noise of its draws" in page.words) == (encoding == "sampled:9")
    assert "Bytes a row against KL" not in page.text


def test_encodings_that_were_measured_have_a_figure(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    cache = dump(replace(dump_config, encoding="auto"))
    text = report.report([cache.path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Bytes a row against KL" in text
    chosen = cache.header.encoding.name
    assert re.search(rf"{chosen} {cache.header.bytes_per_row} bytes, KL [^;]*\(chosen\)", text)
    assert "What more views add" not in text


def test_unlabelled_data_and_their_samples(dump_config: DumpConfig, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "bare.npz", x=images)
    (tmp_path / "m.py").write_text(
        "from torch import nn\n\ndef wide():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))\n"
    )
    bare = f"npz:{tmp_path / 'bare.npz'}"
    teacher = f"{tmp_path / 'm.py'}:wide"
    cache = dump(replace(dump_config, data=bare, teacher=teacher, eval_data=None))
    without = Page(report.report([cache.path], tmp_path / "r.html"))
    assert "Samples it is least sure of" not in without.text
    assert "Confidence and accuracy" not in without.text
    page = Page(report.report([cache.path], tmp_path / "r.html", data=bare))
    assert page.tags.count("img") == 2 + THUMBNAILS


def test_many_classes_show_those_that_look_most_alike(
    embedded: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knowledge, "MAP_CLASSES", 3)
    page = Page(report.report([embedded.path], tmp_path / "r.html"))
    assert "Mean soft targets of the 3 classes of the most similar pairs" in page.words


def test_several_caches_are_told_apart(embedded: Cache, cache: Cache, tmp_path: Path) -> None:
    other = cache.path.rename(tmp_path / "other.h5")
    page = Page(report.report([embedded.path, other], tmp_path / "r.html"))
    for heading in ("The teacher: tiny.h5", "The file: tiny.h5", "The teacher: other.h5"):
        assert heading in page.words


def test_a_baseline_is_found_wherever_it_lies(
    embedded: Cache, data_file: Path, tmp_path: Path
) -> None:
    """The students of a grid share one."""
    config = make_train_config(
        student="mlp:16", cache=embedded.path, data=(), out=tmp_path / "grid", epochs=1, baseline=True,
        eval_data=f"npz:{data_file}@test", students=[{"alpha": 0.5}, {"alpha": 1.0}], device="cpu",
    )  # fmt: skip
    train(config)
    page = Page(report.report([config.out], tmp_path / "r.html"))
    gains = {row[0]: row[-1] for row in page.rows if row[0].startswith("mlp:16")}
    assert list(gains) == ["mlp:16, alpha=0.5", "mlp:16, alpha=1", "mlp:16, hard labels"]
    number = r"[+\N{MINUS SIGN}][\d.]+ ± [\d.]+"
    assert all(re.fullmatch(number, gain) for gain in list(gains.values())[:2])
    assert gains["mlp:16, hard labels"] == "\N{EN DASH}"


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert list(report.short_names(folders)) == ["a/run", "b/run"]
    assert list(report.short_names([tmp_path / "a", tmp_path / "b"])) == ["a", "b"]


def test_what_cannot_be_reported_is_told(
    embedded: Cache, tmp_path: Path, without: Callable[[str], None]
) -> None:
    out = tmp_path / "r.html"
    with pytest.raises(
        FormatError, match=r"nowhere: no such file or folder; name a cache or a fini"
    ):
        report.report([tmp_path / "nowhere"], out)
    with pytest.raises(
        SettingsError, match=r"is not a finished run: it has no student\.safetensors; name"
    ):
        report.report([tmp_path], out)
    with pytest.raises(SettingsError, match="nothing to report; name caches, or run folders"):
        report.report([], out)
    without("matplotlib")
    with pytest.raises(
        SettingsError,
        match=r"needs matplotlib .*; pip install 'softcache\[report\]' "
        r"\(or, in a clone, pip install -e '\.\[report\]'\)",
    ):
        report.report([embedded.path], out)
    assert not out.exists()


def test_strict_writes_no_page_of_what_cannot_be_right(
    grid: Path, data_file: Path, tmp_path: Path, run: Run
) -> None:
    images = np.load(data_file)["x_test"]
    model = open_run(grid / "mlp-16-seed=1").model()
    with torch.inference_mode():
        top = model(torch.from_numpy(images) / 255).argmax(-1).numpy()
    np.savez(tmp_path / "shifted.npz", x=images, y=(top + 1) % 5)
    spec, out = f"npz:{tmp_path / 'shifted.npz'}", tmp_path / "r.html"
    with pytest.raises(DataError, match=r"^The student in .* agrees with .*\. Leave --strict out"):
        report.report([grid], out, eval_data=spec, strict=True)
    assert not out.exists()
    assert run("report", grid, "--eval-data", spec, "--strict", "-o", out).returncode == 1
    report.report([grid], out, eval_data=spec)
    assert "The student in" in Page(out).words


def test_classes_under_other_names_are_evaluated_if_they_are_the_same(
    grid: Path, data_file: Path, tmp_path: Path, run: Run
) -> None:
    copy_run(grid, tmp_path / "run", facts={"class_names": list("abcde")})
    spec, out = f"npz:{data_file}?classes=v,w,x,y,z@test", tmp_path / "r.html"
    with pytest.raises(DataError, match="--same-classes"):
        report.report([tmp_path / "run"], out, eval_data=spec)
    run("report", tmp_path / "run", "--eval-data", spec, "--same-classes", "-o", out, check=True)


def test_a_cache_that_was_opened_is_left_as_it_was(embedded: Cache, tmp_path: Path) -> None:
    before = embedded.path.read_bytes()
    report.report([embedded.path], tmp_path / "r.html")
    assert embedded.path.read_bytes() == before
    assert open_cache(embedded.path).complete
    assert open_trainable(embedded.path).header == embedded.header


# on paper and in a browser


def test_it_is_made_for_paper_too(embedded: Cache, tmp_path: Path) -> None:
    text = report.report([embedded.path], tmp_path / "r.html").read_text(encoding="utf-8")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@page { size: A4;" in style
    paper = style[style.index("@media print") :]
    assert re.search(r"figure,[^}]*break-inside: avoid", paper)
    assert "thead { display: table-header-group; }" in paper


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_it_shows_in_a_browser(embedded: Cache, grid: Path, tmp_path: Path) -> None:
    assert open_run(grid / ORIGINAL).name == ORIGINAL
    out = report.report([embedded.path, grid], tmp_path / "r.html")
    browser = next(path for path in map(shutil.which, BROWSERS) if path)
    shot = tmp_path / "shot.png"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--screenshot={shot}", "--window-size=1000,3400", f"--user-data-dir={tmp_path / 'browser'}",
         out.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (3400, 1000, 3)
    colours = {tuple(colour) for colour in pixels[::5, ::5].reshape(-1, 3).tolist()}
    assert len(colours) > 100  # the map of similar classes is there
    assert any(abs(r - 0x1B) < 4 and abs(g - 0x6C) < 4 and abs(b - 0xA8) < 4 for r, g, b in colours)

"""`softcache pull`: whole and partial pulls, from an HTTP server and from a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from softcache.cache import open_cache
from softcache.cache import writer as cache_writer
from softcache.cache.merge import merge
from softcache.cache.reader import partial_path
from softcache.cache.verify import find_damage
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, Interrupted, RemoteError, SettingsError
from softcache.files import remote
from softcache.files.local_copy import cache_folder, local_copy
from softcache.files.pull import Arrays, Piece, fetch_piece, pull
from softcache.files.remote import RemoteCache
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.configs import replace
from tests.servers import Served, http_server

VIEWS, SAMPLES = 4, 300  # of the cache that is served
BLOCK = 31  # rows, so that no range in a test starts or ends at the border of a block


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setattr(remote, "FIRST_READ", 1024)  # so that even a small file is read in parts
    monkeypatch.setattr(remote, "PART", 4096)
    monkeypatch.setattr("softcache.files.pull.PART", 400)


@pytest.fixture
def config(dump_config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DumpConfig:
    monkeypatch.setattr(
        "softcache.cache.allocate.block_rows", lambda views, samples, *rest: min(BLOCK, samples)
    )
    out = tmp_path / "served" / "cache.h5"
    return replace(dump_config, out=out, views=VIEWS, augment="shift:1", batch_size=BLOCK)


@pytest.fixture(scope="module")
def dumped() -> dict[str, bytes]:
    """The content of the file that is served, by its name; filled by the first test that needs it."""
    return {}


@pytest.fixture
def served(config: DumpConfig, dumped: dict[str, bytes]) -> Iterator[Served]:
    if not dumped:
        dumped["cache.h5"] = dump(config).path.read_bytes()
    config.out.parent.mkdir(exist_ok=True)
    config.out.write_bytes(dumped["cache.h5"])
    with http_server(config.out.parent) as server:
        yield server


def url(served: Served) -> str:
    return f"{served.url}/cache.h5"


def rows_of(served: Served) -> range:
    """The byte range of the soft targets in the file."""
    array = open_cache(served.folder / "cache.h5").header.array("log_probs")
    return range(array.offset, array.offset + array.nbytes)


def test_a_cache_is_opened_and_pulled_without_fcntl(served: Served, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import softcache\nfrom softcache.files.local_copy import local_copy\n"
        "print(len(softcache.open(local_copy(sys.argv[1]))))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, url(served)],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "300"


def test_a_whole_pull_is_the_same_file_to_the_byte(served: Served, tmp_path: Path) -> None:
    copy = pull(url(served), tmp_path / "out" / "copy.h5")
    assert copy.path.read_bytes() == (served.folder / "cache.h5").read_bytes()
    assert sorted(p.name for p in copy.path.parent.iterdir()) == ["copy.h5"]
    assert len(served.asked) > 4 * VIEWS


def test_a_path_is_pulled_as_a_url_is(served: Served, tmp_path: Path) -> None:
    path = served.folder / "cache.h5"
    for number, source in enumerate((str(path), f"file://{path}")):
        copy = pull(source, tmp_path / f"{number}.h5")
        assert copy.path.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("encoding", ["topk:2", "basis:2,1", "quantized", "sampled:5"])
def test_every_encoding_is_pulled_whole_and_in_part(
    config: DumpConfig, tmp_path: Path, encoding: str
) -> None:
    whole = dump(replace(config, encoding=encoding, embed_inputs=True))
    copy = pull(str(config.out), tmp_path / "copy.h5")
    assert copy.path.read_bytes() == config.out.read_bytes()
    part = pull(str(config.out), tmp_path / "part.h5", views=(1, 2), samples=(5, 40))
    assert not find_damage(part)
    rows = np.arange(40)
    for view in range(2):
        np.testing.assert_array_equal(part.rows(view, rows), whole.rows(view + 1, rows + 5))
    np.testing.assert_array_equal(part.arrays["inputs"], whole.arrays["inputs"][5:45])


@pytest.mark.parametrize(
    ("views", "samples"),
    [((0, 1), None), ((1, 3), None), (None, (0, 9)), (None, (3, 57)), ((2, 1), (13, 30))],
)
def test_a_part_is_a_valid_cache_of_the_requested_range(
    served: Served, tmp_path: Path, views: tuple[int, int] | None, samples: tuple[int, int] | None
) -> None:
    whole = open_cache(served.folder / "cache.h5")
    part = pull(url(served), tmp_path / "part.h5", views=views, samples=samples)
    first_view, count = views or (0, VIEWS)
    first, length = samples or (0, SAMPLES)
    header = part.header
    assert (header.first_view, header.views) == (first_view, count)
    assert (header.first_sample, header.samples, header.data_samples) == (first, length, SAMPLES)
    assert not find_damage(part)
    rows = np.arange(length)
    for view in range(count):
        expected = whole.rows(view + first_view, rows + first)
        np.testing.assert_array_equal(part.rows(view, rows), expected)
    np.testing.assert_array_equal(part.keys, whole.keys[first : first + length])
    np.testing.assert_array_equal(part.labels, whole.labels[first : first + length])
    assert header.summary is not None
    assert whole.header.summary is not None
    assert header.summary["fidelity"] == whole.header.summary["fidelity"]


def test_views_that_are_not_requested_are_not_fetched(served: Served, tmp_path: Path) -> None:
    pull(url(served), tmp_path / "part.h5", views=(1, 1))
    header = open_cache(served.folder / "cache.h5").header
    array = header.array("log_probs")
    size = array.nbytes // VIEWS
    for start, length in served.asked:
        if start + length > array.offset and start < array.offset + array.nbytes:
            assert array.offset + size <= start
            assert start + length <= array.offset + 2 * size


def test_embedded_inputs_count_towards_the_size_of_a_piece(
    config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(replace(config, embed_inputs=True))
    # in bytes: several blocks of rows, but less than one block with its inputs
    monkeypatch.setattr("softcache.files.pull.PART", 40 * BLOCK)
    fetched: list[tuple[int, int]] = []

    def counted(remote: RemoteCache, piece: Piece) -> tuple[Arrays, Arrays]:
        fetched.append((piece.view, piece.stop - piece.first))
        return fetch_piece(remote, piece)

    monkeypatch.setattr("softcache.files.pull.fetch_piece", counted)
    pull(str(config.out), tmp_path / "copy.h5")
    assert max(blocks for view, blocks in fetched if view == 0) == 1, "inputs have 64 bytes"
    assert max(blocks for view, blocks in fetched if view == 1) > 1


def test_parts_merge_into_the_whole_again(served: Served, tmp_path: Path) -> None:
    parts = [
        pull(url(served), tmp_path / f"{view}-{first}.h5", views=(view, 2), samples=(first, 150))
        for view in (0, 2)
        for first in (0, 150)
    ]
    merged, whole = merge(parts, tmp_path / "merged.h5"), open_cache(served.folder / "cache.h5")
    rows = np.arange(SAMPLES)
    for view in range(VIEWS):
        np.testing.assert_array_equal(merged.rows(view, rows), whole.rows(view, rows))


def test_a_student_learns_from_a_part(config: DumpConfig, served: Served, tmp_path: Path) -> None:
    part = pull(url(served), tmp_path / "part.h5", views=(1, 2), samples=(10, 45))
    student = make_train_config(
        cache=part.path, student="mlp:8", data=config.data, out=tmp_path / "run", epochs=2
    )
    train(student)
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_a_range_that_is_not_there_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"views 3 to 4 of http.*cache\.h5; it has 0 to 3"):
        pull(url(served), tmp_path / "x.h5", views=(3, 2))
    with pytest.raises(SettingsError, match=r"samples 0 to 300 of .*; it has 0 to 299"):
        pull(url(served), tmp_path / "x.h5", samples=(0, 301))
    with pytest.raises(SettingsError, match=r"none of samples 1 to 2 has fing.*with sample 0"):
        pull(url(served), tmp_path / "x.h5", samples=(1, 2))
    assert not list(tmp_path.glob("x.h5*"))


def test_another_content_id_than_expected_is_refused(served: Served, tmp_path: Path) -> None:
    content_id = open_cache(served.folder / "cache.h5").content_id()
    pull(url(served), tmp_path / "a.h5", expect=content_id.upper())
    with pytest.raises(
        FormatError, match=r"has content id \w+; expected 1234: this is another cache"
    ):
        pull(url(served), tmp_path / "b.h5", expect="1234")
    assert not (tmp_path / "b.h5").exists()


# existing files


def test_the_same_pull_again_finds_it_complete(served: Served, tmp_path: Path) -> None:
    first = pull(url(served), tmp_path / "a.h5")
    served.asked.clear()
    assert pull(url(served), tmp_path / "a.h5").content_id() == first.content_id()
    assert not any(start in rows_of(served) for start, _ in served.asked)


def test_another_file_is_not_replaced_unless_asked(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    out.write_text("another file")
    with pytest.raises(
        SettingsError, match=r"a\.h5 already exists, and is not a copy of http.*--overwrite"
    ):
        pull(url(served), out)
    assert out.read_text() == "another file"
    pull(url(served), out, overwrite=True)
    with pytest.raises(SettingsError, match="already exists"):
        pull(url(served), out, views=(0, 1))


# interruptions


def test_a_broken_connection_is_tried_again(served: Served, tmp_path: Path) -> None:
    broken: list[int] = []

    def answer(start: int, body: bytes) -> bytes | None:
        if start % 3 == 0 and start not in broken:
            broken.append(start)
            return None
        return body

    served.answer = answer
    copy = pull(url(served), tmp_path / "copy.h5")
    assert copy.path.read_bytes() == (served.folder / "cache.h5").read_bytes()
    assert len(broken) > 5


@pytest.mark.parametrize("part", [False, True])
def test_a_pull_that_was_cut_off_continues(
    served: Served, tmp_path: Path, part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    views, samples = ((1, 2), (5, 50)) if part else (None, None)
    rows = rows_of(served)
    middle = (rows.start + rows.stop) // 2
    served.answer = lambda start, body: None if middle < start < rows.stop else body
    out = tmp_path / "copy.h5"
    with pytest.raises(RemoteError, match=r"cache\.h5: bytes [\d,]+ to [\d,]+ cannot be read \(Cl"):
        pull(url(served), out, views=views, samples=samples)
    assert partial_path(out).exists()
    served.answer, requests = (lambda start, body: body), len(served.asked)
    copy = pull(url(served), out, views=views, samples=samples)
    assert not find_damage(copy)
    repeated = [
        start for start, _ in served.asked[requests:] if rows.start <= start < middle - 1000
    ]
    assert len(repeated) <= 2, "rows that were already written are fetched again"
    assert not list(tmp_path.glob("copy.h5.*"))
    if not part:
        assert out.read_bytes() == (served.folder / "cache.h5").read_bytes()


def test_a_file_that_changed_between_two_pulls_is_refused(
    served: Served, config: DumpConfig, tmp_path: Path
) -> None:
    out = tmp_path / "copy.h5"
    rows = rows_of(served)
    served.answer = lambda start, body: None if rows.stop - 900 < start < rows.stop else body
    with pytest.raises(RemoteError, match="cannot be read"):
        pull(url(served), out)
    served.answer = lambda start, body: body
    dump(replace(config, temperature=3.0, overwrite=True))
    with pytest.raises(
        SettingsError, match=r"started when its content id was \w+, now it is \w+; rem"
    ):
        pull(url(served), out)
    copy = pull(url(served), out, overwrite=True)
    assert copy.header.temperature == 3.0


def test_a_file_that_changes_during_a_pull_is_refused(
    served: Served, config: DumpConfig, tmp_path: Path
) -> None:
    dump(replace(config, out=tmp_path / "other.h5", temperature=3.0))
    other = (tmp_path / "other.h5").read_bytes()
    rows = rows_of(served)

    def answer(start: int, body: bytes) -> bytes:
        return other[start : start + len(body)] if start in rows else body

    served.answer = answer
    with pytest.raises(
        FormatError, match=r"soft targets in view 0 of samples 0 to 30 do not match"
    ):
        pull(url(served), tmp_path / "copy.h5")
    assert not (tmp_path / "copy.h5").exists()


def test_another_range_does_not_continue_a_pull(served: Served, tmp_path: Path) -> None:
    rows = rows_of(served)
    served.answer = lambda start, body: None if start in rows and start != rows.start else body
    out = tmp_path / "copy.h5"
    with pytest.raises(RemoteError, match="cannot be read"):
        pull(url(served), out)
    served.answer = lambda start, body: body
    with pytest.raises(
        SettingsError, match=r"partial is in the way: .* was started with another part"
    ):
        pull(url(served), out, views=(0, 1))
    partial_path(out).with_name("copy.h5.partial.source").unlink()
    with pytest.raises(
        SettingsError, match=r"partial is in the way: it was not started by a pull of http"
    ):
        pull(url(served), out)


def test_a_pull_that_is_killed_continues(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "copy.h5"
    header, rows = open_cache(served.folder / "cache.h5").header, rows_of(served)

    def slow(start: int, body: bytes) -> bytes:
        time.sleep(0.2 if start in rows else 0.0)
        return body

    served.answer = slow
    code = (
        "import sys\nfrom pathlib import Path\nimport softcache.files.pull as p\n"
        "from softcache.cache import writer\np.PART = 400\nwriter.COMMIT_SECONDS = 0.0\n"
        "p.pull(sys.argv[1], Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, url(served), str(out)])
    while not partial_path(out).exists() or open_cache(
        partial_path(out), unfinished=True
    ).missing_blocks() == header.blocks * (VIEWS + 1):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    served.answer = lambda start, body: body
    assert pull(url(served), out).path.read_bytes() == (served.folder / "cache.h5").read_bytes()


def test_ctrl_c_says_that_the_same_command_continues(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("softcache.files.pull.fetch_missing", stop)
    with pytest.raises(Interrupted, match=r"stopped; .*copy\.h5\.partial is kept: the same comm"):
        pull(url(served), tmp_path / "copy.h5")


# train from a URL


def test_training_from_a_url_pulls_it_into_the_cache_folder(
    served: Served,
    config: DumpConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "softcache"
    secret = f"{url(served)}?token=hunter2"
    path = local_copy(secret)
    output = capsys.readouterr().out
    assert f"pulling {url(served)}: {config.out.stat().st_size:,} bytes into" in output
    assert path.read_bytes() == config.out.read_bytes()
    served.asked.clear()
    assert local_copy(secret) == path
    assert len(served.asked) <= 4, "more than the header and the digests is read again"
    run = subprocess.run(
        [sys.executable, "-m", "softcache", "train", secret, "--student", "mlp:8", "--data",
         config.data, "--out", str(tmp_path / "run"), "--epochs", "1"],
        capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file
    assert "hunter2" not in run.stdout + run.stderr + output


def test_only_the_views_of_a_short_training_are_pulled(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    part = local_copy(url(served), most_views=2)
    assert open_cache(part).header.views == 2
    whole = local_copy(url(served), most_views=9)
    assert open_cache(whole).header.views == VIEWS
    assert local_copy(url(served), most_views=2) == whole


def test_a_relative_xdg_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder() == Path.home() / ".cache" / "softcache"


def test_a_path_is_its_own_copy(tmp_path: Path) -> None:
    assert local_copy(tmp_path / "x.h5") == tmp_path / "x.h5"

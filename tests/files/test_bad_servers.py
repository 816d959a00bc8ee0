"""Servers that send too much, too little, or something else: a command ends in one line, and soon."""

from __future__ import annotations

import gzip
import resource
import time
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path

import pytest

from softcache.cache import Cache, open_cache
from softcache.errors import FormatError, RemoteError
from softcache.files import pull as pull_module
from softcache.files import remote
from softcache.files.local_copy import local_copy
from softcache.files.pull import pull
from softcache.util.urls import public_url, without_secrets
from tests.cli.app_cases import softcache
from tests.servers import Served, http_server


@pytest.fixture
def served(cache: Cache, tmp_path: Path) -> Served:  # type: ignore[misc]
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "cache.h5").write_bytes(cache.path.read_bytes())
    with http_server(folder) as served:
        yield served


def url(served: Served, name: str = "cache.h5") -> str:
    return f"{served.url}/{name}"


def endless(status: bytes) -> Callable[[BufferedIOBase, int], object]:
    """A reply whose body does not end, until the client has had enough."""

    def reply(file: BufferedIOBase, first: int) -> None:
        file.write(b"HTTP/1.1 " + status + b"\r\nContent-Type: text/plain\r\n\r\n")
        for _ in range(40_000):  # 2.6 GB
            file.write(b"x" * 65536)

    return reply


def drip(file: BufferedIOBase, first: int) -> None:
    """A byte each half second."""
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-99999/100000\r\n"
    file.write(head.encode() + b"Content-Length: 65536\r\n\r\n")
    for _ in range(1000):
        file.write(b"x")
        file.flush()
        time.sleep(0.05)


def coloured(file: BufferedIOBase, first: int) -> None:
    """Escape codes where messages quote the server."""
    file.write(b"HTTP/1.1 206 Partial Content\r\nContent-Range: \x1b[31mred\x1b]0;title\x07\r\n")
    file.write(b"Content-Length: 4\r\n\r\nabcd")


def packed(body: bytes) -> Callable[[BufferedIOBase, int], object]:
    def reply(file: BufferedIOBase, first: int) -> None:
        raw = gzip.compress(body[first : first + 65536])
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{first + 65535}/{len(body)}\r\n"
        file.write(
            head.encode() + f"Content-Encoding: gzip\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        )
        file.write(raw)

    return reply


@pytest.mark.parametrize(
    "status", [b"500 Oops", b"404 Not Found", b"200 OK", b"206 Partial Content"]
)
def test_an_endless_answer_is_not_read_to_its_end(
    served: Served, tmp_path: Path, status: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.0)
    served.raw = endless(status)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RemoteError, match="cannot be read"):
        pull(url(served), tmp_path / "copy.h5")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("copy")) == []


def test_a_drip_is_given_up(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    served.raw = drip
    start = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"TooSlow: \d+ bytes in .* expected at least 2,048 a second"
    ):
        pull(url(served), tmp_path / "copy.h5")
    assert time.monotonic() - start < 10


def test_packed_ranges_are_refused(served: Served, tmp_path: Path) -> None:
    served.raw = packed((served.folder / "cache.h5").read_bytes())
    with pytest.raises(RemoteError, match="packs its answers with gzip, which was not asked for"):
        pull(url(served), tmp_path / "copy.h5")


@pytest.mark.parametrize("command", [["info"], ["pull", "-o", "copy.h5"]])
def test_escape_codes_of_a_server_are_not_printed(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "WAIT", 0.0)
    served.raw = coloured
    result = softcache(command[0], url(served), *command[1:])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.strip().isprintable()


def test_nothing_is_reserved_before_the_first_block_is_checked(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = open_cache(served.folder / "cache.h5").header
    rows = header.array("log_probs")
    inside = range(rows.offset, rows.offset + rows.nbytes)
    served.answer = lambda start, body: bytes(len(body)) if start in inside else body
    monkeypatch.setattr(pull_module, "clone", None)  # is not called
    out = tmp_path / "new" / "copy.h5"
    with pytest.raises(FormatError, match=r"soft targets in view 0 of samples .* do not match"):
        pull(url(served), out)
    assert not out.parent.exists()


def test_a_cache_may_be_called_lock(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("lock", "whole", ".lock"):
        (served.folder / "cache.h5").rename(served.folder / name)
        copy = local_copy(url(served, name))
        assert copy.read_bytes() == (served.folder / name).read_bytes()
        (served.folder / name).rename(served.folder / "cache.h5")


@pytest.mark.parametrize("most_views", [None, 1])
@pytest.mark.parametrize("change", ["emptied", "other", "damaged"])
def test_a_local_copy_that_is_not_the_sources_is_fetched_again(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, most_views: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if most_views and open_cache(served.folder / "cache.h5").header.views == 1:
        monkeypatch.setattr(pull_module, "is_whole", lambda header, part: True)
        most_views = None
    copy = local_copy(url(served), most_views=most_views)
    right = copy.read_bytes()
    copy.chmod(0o644)
    if change == "emptied":
        copy.write_bytes(b"")
    elif change == "other":
        header = open_cache(copy).header
        raw = bytearray(right)
        raw[header.array("digests").offset] ^= 1
        copy.write_bytes(raw)
    else:
        copy.write_bytes(right[:-10])
    assert local_copy(url(served), most_views=most_views) == copy
    assert copy.read_bytes() == right
    assert "is not the copy that was pulled; it is pulled again" in capsys.readouterr().out
    assert sorted(path.name for path in copy.parent.iterdir()) == [
        "cache.h5",
        "cache.h5.content-id",
    ]


SECRET = "https://me:s3cret@example.org/a/cache.h5?token=s3cret#s3cret"


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", SECRET], ["report", SECRET], ["merge", SECRET, SECRET, "-o", "m.h5"], ["repair", SECRET],
        ["export-labels", SECRET, "-o", "l.npy"], ["compare", SECRET], ["export", SECRET, "--onnx"],
        ["push", SECRET, "x"], ["train", "x.h5", "--student", "mlp:8", "--data", f"npz:{SECRET}", "-o", "r"],
        ["dump", "--teacher", SECRET, "--data", f"npz:{SECRET}", "-o", "c.h5"], ["import", SECRET],
        ["info", SECRET.replace("https", "nonsense")],
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_secrets_in_a_url_are_never_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = softcache(*arguments)
    assert result.exit_code != 0
    assert "s3cret" not in result.output
    assert "s3cret" not in result.stderr


def test_secrets_are_left_out_of_texts() -> None:
    assert public_url(SECRET) == "https://example.org/a/cache.h5"
    assert without_secrets(f"no {SECRET} here") == "no https://example.org/a/cache.h5 here"
    collapsed = str(Path(SECRET))
    assert "s3cret" not in without_secrets(f"{collapsed}: no such file")
    for text in ("c:/folder/file", "12:/3", "plain text: nothing", "http://[::1"):
        without_secrets(text)


def test_an_answer_that_is_longer_than_asked_for_is_refused(served: Served) -> None:
    served.answer = lambda start, body: body + b"x"
    with pytest.raises(RemoteError, match="more than the"):
        remote.open_remote(url(served))

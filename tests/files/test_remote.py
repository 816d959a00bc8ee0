"""Caches read over HTTP: honest servers, servers that lie, and secrets in URLs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from softcache.cache import Cache, open_cache
from softcache.cli.app import main
from softcache.errors import FormatError, RemoteError, SettingsError
from softcache.files import remote
from softcache.files.pull import pull
from softcache.files.remote import in_parallel, open_file, open_remote
from softcache.util.urls import public_url, without_secrets
from tests.conftest import SAMPLES
from tests.servers import Served, http_server

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.0)


@pytest.fixture
def served(cache: Cache) -> Iterator[Served]:
    with http_server(cache.path.parent) as server:
        yield server


def url(served: Served) -> str:
    return f"{served.url}/tiny.h5"


def test_header_and_digests_of_a_url_are_those_of_the_file(served: Served, cache: Cache) -> None:
    remote_cache = open_remote(url(served))
    assert remote_cache.header == cache.header
    assert remote_cache.content_id == cache.content_id()
    assert remote_cache.with_names().class_names == cache.class_names
    assert not any(length > 1 << 16 for _, length in served.asked)


def test_info_of_a_url_reads_no_row(served: Served, cache: Cache) -> None:
    result = CliRunner().invoke(main, ["info", f"{url(served)}?token={SECRET}"])
    assert result.exit_code == 0, result.output
    assert f"cache        {url(served)}, format 1.0" in result.output
    assert cache.content_id() in result.output
    assert SECRET not in result.output
    rows = cache.header.array("log_probs")
    starts = [start for start, _ in served.asked if start > 0]
    assert not any(rows.offset <= start < rows.offset + rows.nbytes for start in starts)
    as_json = CliRunner().invoke(main, ["info", "--json", url(served)])
    assert f'"content_id": "{cache.content_id()}"' in as_json.output


def test_a_file_that_is_not_a_cache_is_refused(served: Served) -> None:
    (served.folder / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(FormatError, match=r"x\.h5: an HDF5 file, but not a softcache cache"):
        open_remote(f"{served.url}/x.h5")
    (served.folder / "short.h5").write_bytes(b"abc")
    with pytest.raises(
        FormatError, match=r"short\.h5: a file that begins with 616263, not a cache"
    ):
        open_remote(f"{served.url}/short.h5")


def test_an_unfinished_cache_is_refused(served: Served, cache: Cache) -> None:
    raw = bytearray(cache.path.read_bytes())
    digests = cache.header.array("digests")
    raw[digests.offset : digests.offset + 8] = bytes(8)
    (served.folder / "gap.h5").write_bytes(raw)
    with pytest.raises(
        FormatError, match=r"gap\.h5 is unfinished or damaged: 1 of its blocks are mis"
    ):
        open_remote(f"{served.url}/gap.h5")


# servers that lie


def test_a_server_without_ranges_is_refused_before_it_sends_the_file(served: Served) -> None:
    served.ranges = False
    with pytest.raises(
        RemoteError, match=r"answers 200 without a range; it does not serve byte ranges"
    ):
        open_remote(url(served))


def test_more_bytes_than_requested_are_not_read(served: Served) -> None:
    served.answer = lambda start, body: body + bytes(50 << 20)
    start_time = time.monotonic()
    with pytest.raises(
        RemoteError, match=r"the server returns more than the [\d,]+ bytes requested"
    ):
        open_remote(url(served))
    assert time.monotonic() - start_time < 20


def test_fewer_bytes_than_requested_are_refused(served: Served) -> None:
    served.answer = lambda start, body: body[:-1]
    with pytest.raises(
        RemoteError, match=r"returned [\d,]+ bytes from offset 0; expected [\d,]+: it does not"
    ):
        open_remote(url(served))


def test_wrong_bytes_of_the_header_are_found(served: Served) -> None:
    served.answer = lambda start, body: body[:40] + b"!" + body[41:] if start == 0 else body
    with pytest.raises(FormatError, match=r"tiny\.h5: the header does not match its digest"):
        open_remote(url(served))


@pytest.mark.parametrize("what", ["arrays other than rows", "the HDF5 structure", "one block"])
def test_a_header_that_would_fill_the_memory_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    size = remote.memory_sizes(open_remote(url(served)).header)[what]
    monkeypatch.setattr(remote, "memory_sizes", lambda header: {"a": size - 1, what: size})
    monkeypatch.setattr(remote, "MAX_IN_MEMORY", size - 1)
    with pytest.raises(
        FormatError, match=rf"tiny\.h5: {what}: {size:,} bytes to .* at most {size - 1:,}"
    ):
        open_remote(url(served))


def test_everything_but_the_rows_is_counted_as_held_in_memory(cache: Cache) -> None:
    header = cache.header
    sizes = remote.memory_sizes(header)
    block_bytes = sum(a.nbytes for a in header.arrays if a.axis in ("rows", "samples"))
    assert sizes["one block"] * SAMPLES == block_bytes * header.block_rows
    rest = sizes["arrays other than rows"] + sizes["the HDF5 structure"] + header.user_block
    assert rest + block_bytes == header.file_bytes


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("rows", r"the soft targets in view 0 of samples 0 to \d+ do not match their digest"),
        ("samples", r"the labels and keys of samples 0 to \d+ do not match their digest"),
        ("shared", r"arrays shared by all rows do not match their digest"),
        ("commits", r"do not match their digest"),
        ("hdf5", r"the hdf5_digest is \w+; the header says \w+; its server returns wrong bytes"),
    ],
)
def test_a_wrong_byte_anywhere_is_found_and_no_file_is_left(
    served: Served, cache: Cache, tmp_path: Path, axis: str, message: str
) -> None:
    header = cache.header
    offsets = {a.axis: a.offset for a in header.arrays} | {"hdf5": header.user_block + 20}

    def answer(start: int, body: bytes) -> bytes:
        index = offsets[axis] - start
        if start == 0 or not 0 <= index < len(body):
            return body
        return body[:index] + bytes([body[index] ^ 1]) + body[index + 1 :]

    served.answer = answer
    out = tmp_path / "out" / "copy.h5"
    with pytest.raises(FormatError, match=message):
        pull(url(served), out)
    assert not out.exists()


def test_a_size_that_is_not_the_files_is_refused(served: Served) -> None:
    served.size_said = 10_000_000
    with pytest.raises(
        FormatError, match=r"tiny\.h5: the file has 10,000,000 bytes, its header says"
    ):
        open_remote(url(served))


def test_a_redirect_to_a_file_is_not_followed(served: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    served.redirect = f"file://{secret}"
    with pytest.raises(RemoteError, match=r"tiny\.h5 cannot be opened \(") as caught:
        open_remote(url(served))
    assert SECRET not in str(caught.value)


def test_a_redirect_to_another_server_is_followed(served: Served, cache: Cache) -> None:
    with http_server(cache.path.parent) as redirecting:
        redirecting.redirect = url(served)
        assert open_remote(url(redirecting)).content_id == cache.content_id()


def test_a_missing_file_is_named_at_once(served: Served) -> None:
    with pytest.raises(
        RemoteError, match=r"nothing\.h5 cannot be opened \(ClientResponseError: 404"
    ):
        open_file(f"{served.url}/nothing.h5")
    with pytest.raises(RemoteError, match=r"nothing\.h5 cannot be opened \(FileNotFoundError"):
        open_file(str(served.folder / "nothing.h5"))


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(RemoteError, match=r"http://127\.0\.0\.1:9/x\.h5 cannot be opened \("):
        open_file("http://127.0.0.1:9/x.h5")


# secrets


@pytest.mark.parametrize(
    ("secret", "public"),
    [
        ("https://me:pass@host:8080/a/b.h5?X-Sig=1#f", "https://host:8080/a/b.h5"),
        ("s3://bucket/key.h5", "s3://bucket/key.h5"),
        ("hf://datasets/me/repo/x.h5", "hf://datasets/me/repo/x.h5"),
        ("/a/b@c.h5", "/a/b@c.h5"),
    ],
)
def test_a_public_url_has_no_secrets(secret: str, public: str) -> None:
    assert public_url(secret) == public
    message = without_secrets(f"404, message='Not\n Found', url='{secret}'")
    assert message == f"404, message='Not Found', url='{public}'"


@pytest.mark.parametrize("name", ["missing.h5", "tiny.h5"])
def test_no_message_of_a_failure_holds_a_secret(served: Served, name: str) -> None:
    served.answer = lambda start, body: None
    host = served.url.removeprefix("http://")
    result = CliRunner().invoke(
        main, ["pull", f"http://me:{SECRET}@{host}/{name}?token={SECRET}", "-o", "x.h5"]
    )
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: http://{host}/{name}")
    assert SECRET not in result.output


def test_user_and_password_are_sent_to_the_server(served: Served) -> None:
    host = served.url.removeprefix("http://")
    open_remote(f"http://me:{SECRET}@{host}/tiny.h5")
    assert served.headers[-1]["Authorization"].startswith("Basic ")


# kinds of URL


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"ftp://host/x has unknown scheme 'ftp'; expected a path"
    ):
        open_file("ftp://host/x")
    with pytest.raises(SettingsError, match="has unknown scheme 'simplecache::http'"):
        open_file("simplecache::http://me:pass@host/x")
    assert public_url("simplecache::http://me:pass@host/x?q") == "simplecache::http://host/x"
    assert public_url("http://me:pass@[::1]:80/x") == "http://[::1]:80/x"


@pytest.mark.parametrize(
    ("location", "module", "extra"),
    [
        ("http://host/x", "aiohttp", "remote"),
        ("s3://bucket/x", "s3fs", "s3"),
        ("gs://bucket/x", "gcsfs", "gcs"),
        ("hf://datasets/me/repo/x", "huggingface_hub", "hub"),
    ],
)
def test_a_missing_extra_is_named(
    location: str,
    module: str,
    extra: str,
    without: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(module)
    loaded = sys.modules["fsspec.registry"]._registry
    for implementation in list(loaded):
        monkeypatch.delitem(loaded, implementation)
    with pytest.raises(
        SettingsError,
        match=rf"pip install 'softcache\[{extra}\]' \(or, in a clone, pip install -e '\.\[{extra}\]'\)",
    ):
        open_file(location)


def test_parallel_results_come_in_order_and_stop_at_the_first_error() -> None:
    done: list[int] = []

    def work(task: int) -> int:
        time.sleep(0.001 * (task % 3))
        if task == 40:
            raise ValueError("no more")
        done.append(task)
        return task

    results = in_parallel(work, range(1000))
    taken: list[int] = []
    with pytest.raises(ValueError, match="no more"):
        taken += results
    assert taken == list(range(40)) or taken == []
    assert len(done) < 100, "it runs too far ahead of the consumer"


def test_a_local_file_does_not_need_aiohttp(cache: Cache, without: Callable[[str], None]) -> None:
    without("aiohttp")
    assert open_remote(str(cache.path)).content_id == open_cache(cache.path).content_id()

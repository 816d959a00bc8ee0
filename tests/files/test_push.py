"""`softcache push`: the upload of a cache and its card, to a folder and to S3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from softcache.cache import Cache, open_cache
from softcache.cli.app import main
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError, RemoteError, SettingsError
from softcache.files.pull import pull
from softcache.files.push import push
from softcache.files.remote import open_remote
from tests.servers import s3_server

SECRET = "hunter2secret"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket on a local S3 server."""
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", s3),
        ("AWS_ACCESS_KEY_ID", "me"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().makedirs("caches", exist_ok=True)
    return "s3://caches"


def test_a_cache_is_pushed_to_a_folder_with_its_card(cache: Cache, tmp_path: Path) -> None:
    message = push(cache.path, f"{tmp_path / 'shared'}/")
    target = tmp_path / "shared" / "tiny.h5"
    assert target.read_bytes() == cache.path.read_bytes()
    assert message == (
        f"{target}: {cache.header.file_bytes:,} bytes, content id {cache.content_id()}; with README.md"
    )
    assert sorted(p.name for p in target.parent.iterdir()) == ["README.md", "tiny.h5"]


def test_the_card_says_what_the_header_does(cache: Cache, tmp_path: Path) -> None:
    push(cache.path, f"{tmp_path / 'shared'}/")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: softcache\n")
    for fact in ("models.py:teacher", "npz:tiny.npz@train", "300 samples", "temperature  4"):
        assert fact in card
    assert f"-o tiny.h5 --expect {cache.content_id()}" in card


def test_s3_gives_back_what_was_pushed(cache: Cache, bucket: str, tmp_path: Path) -> None:
    push(cache.path, f"{bucket}/some/folder/")
    url = f"{bucket}/some/folder/tiny.h5"
    assert open_remote(url).content_id == cache.content_id()
    copy = pull(url, tmp_path / "copy.h5")
    assert copy.path.read_bytes() == cache.path.read_bytes()
    part = pull(url, tmp_path / "part.h5", samples=(0, 100))
    assert part.header.samples == 100
    result = CliRunner().invoke(main, ["info", url])
    assert result.exit_code == 0, result.output
    assert cache.content_id() in result.output


def test_no_secret_reaches_header_card_or_output(cache: Cache, bucket: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["push", str(cache.path), f"{bucket}/secret/"])
    assert result.exit_code == 0, result.output
    pull(f"{bucket}/secret/tiny.h5", tmp_path / "copy.h5", samples=(0, 100))
    pull(f"{bucket}/secret/tiny.h5", tmp_path / "whole.h5")
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    missing = CliRunner().invoke(main, ["pull", f"{bucket}/no.h5", "-o", str(tmp_path / "x.h5")])
    assert missing.exit_code == 1
    assert SECRET not in result.output + missing.output


def test_a_bucket_that_is_not_there_is_named(cache: Cache, bucket: str) -> None:
    with pytest.raises(
        RemoteError, match=r"cannot be uploaded to s3://nobodys/tiny\.h5 \(FileNotF"
    ):
        push(cache.path, "s3://nobodys/")


@pytest.mark.parametrize("storage", ["folder", "s3"])
def test_the_same_cache_again_is_found_and_another_is_not_replaced(
    dump_config: DumpConfig, tmp_path: Path, storage: str, request: pytest.FixtureRequest
) -> None:
    folder = str(tmp_path / "shared")
    if storage == "s3":
        folder = request.getfixturevalue("bucket") + "/twice"
    cache = dump(dump_config)
    other = dump(replace(dump_config, temperature=2.0, out=tmp_path / "b" / "tiny.h5"))
    push(cache.path, f"{folder}/")
    assert "tiny.h5 already holds this cache: content id" in push(cache.path, f"{folder}/tiny.h5")
    with pytest.raises(SettingsError, match=r"tiny\.h5 already exists, and is another file; give"):
        push(other.path, f"{folder}/")
    push(other.path, f"{folder}/", overwrite=True)
    assert open_remote(f"{folder}/tiny.h5").content_id == other.content_id()


def test_somebody_elses_card_is_kept(cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "README.md").write_text("my words")
    message = push(cache.path, str(folder))
    assert message.endswith("; the README.md there is not a softcache card and was kept")
    assert (folder / "README.md").read_text() == "my words"


def test_a_damaged_cache_is_not_pushed(cache: Cache, tmp_path: Path) -> None:
    offset = cache.header.array("log_probs").offset
    with cache.path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\xff")
    with pytest.raises(FormatError, match=r"tiny\.h5 is damaged: soft targets of samples 0 to"):
        push(cache.path, f"{tmp_path / 'shared'}/")
    assert not (tmp_path / "shared").exists()


def test_an_unfinished_cache_is_not_pushed(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nothing\.h5: No such file"):
        push(tmp_path / "nothing.h5", f"{tmp_path / 'shared'}/")


def test_http_takes_no_files(cache: Cache) -> None:
    with pytest.raises(
        SettingsError, match=r"https://host/x: an HTTP server does not accept uploads"
    ):
        push(cache.path, "https://me:pass@host/x?token=1")


def test_another_cache_at_the_destination_after_the_upload_is_an_error(
    cache: Cache, tmp_path: Path, dump_config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dump(replace(dump_config, temperature=2.0, out=tmp_path / "other.h5"))
    monkeypatch.setattr(
        "softcache.files.push.open_remote", lambda location: open_remote(str(other.path))
    )
    with pytest.raises(
        RemoteError, match=r"has content id \w+ after the upload, .* has \w+; push it again"
    ):
        push(cache.path, f"{tmp_path / 'shared'}/")
    assert open_cache(tmp_path / "shared" / "tiny.h5").content_id() == cache.content_id()

"""One writer at a time: the second is told who is writing, and a lock ends with its holder."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softcache.errors import InUseError
from softcache.util import lock
from softcache.util.lock import exclusive

HOLD = """
import sys, time
from pathlib import Path
from softcache.util.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held(path: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(seconds)], text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_is_told_who_is_writing(tmp_path: Path) -> None:
    path = tmp_path / "cache.h5"
    with held(path) as process:
        with (
            pytest.raises(
                InUseError,
                match=rf"cache\.h5 is being written by process {process.pid} on "
                rf"{socket.gethostname()}; wait until that has finished, or give another name",
            ),
            exclusive(path),
        ):
            pass
        with exclusive(tmp_path / "other.h5"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == [".cache.h5.lock"]  # its holder was killed


def test_a_lock_ends_with_its_holder_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cache.h5"
    with held(path) as process:
        pass
    with exclusive(path):
        pass
    told = capsys.readouterr().out
    assert f"note: process {process.pid} on" in told
    assert f"stopped while it was writing {path}" in told
    assert not list(tmp_path.iterdir())
    with exclusive(path):
        pass
    assert capsys.readouterr().out == ""


def test_one_that_waits_gets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "cache.h5"
    with held(path, 0.5) as process, exclusive(path, wait=True):
        told = capsys.readouterr().out
    assert (
        told
        == f"waiting for process {process.pid} on {socket.gethostname()}, which is writing {path}\n"
    )


def test_workers_that_outlive_a_killed_holder_do_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.h5"
    program = HOLD.replace("    time", "    import os\n    os.fork()\n    time")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), "30"], text=True, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    time.sleep(0.2)  # for the fork
    process.kill()
    process.wait()
    try:
        with exclusive(path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_it_is_released_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cache.h5"
    with pytest.raises(ValueError, match="mine"), exclusive(path):
        raise ValueError("mine")
    with exclusive(path):
        pass
    assert not list(tmp_path.iterdir())


def test_many_at_once_are_never_inside_together(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom softcache.util.lock import exclusive\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(40):\n"
        "    with exclusive(folder / 'x', wait=True):\n"
        "        inside = folder / 'inside'\n"
        "        inside.touch(exist_ok=False)\n"
        "        time.sleep(0.001)\n"
        "        inside.unlink()\n"
    )
    start = f"from softcache.util import lock; lock.POLL = 0.002\n{program}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start, str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["no locks", "no permission", "no module"])
def test_where_nothing_can_be_locked_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(95, "not supported")

    if what == "no locks":
        monkeypatch.setattr(fcntl, "lockf", fail)
    elif what == "no permission":
        monkeypatch.setattr(os, "open", fail)
    else:
        monkeypatch.setattr(lock, "fcntl", None)
    with exclusive(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_file_is_no_link_to_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.lock").symlink_to(tmp_path / "mine")
    with exclusive(tmp_path / "x"):
        time.sleep(0)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("other", [".", "link", "../run", "../run/"])
def test_all_names_of_a_folder_share_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    with (
        held(folder),
        pytest.raises(InUseError, match="is being written by process"),
        exclusive(Path(other)),
    ):
        pass


def test_the_root_of_the_file_system_has_none() -> None:
    with exclusive(Path("/")):
        pass


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_what_is_no_lock_file_is_told(
    tmp_path: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / ".x.lock")
    with exclusive(tmp_path / "x"):
        pass
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "is no lock file, so" in record.message
    assert "is written without a lock; remove it" in record.message


def test_the_lock_of_another_user_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "x", os.open

    def not_mine(file: str | Path, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR and Path(file).exists():
            raise PermissionError(13, "Permission denied")
        return opened(file, flags, *mode)

    with held(path) as process:
        monkeypatch.setattr(os, "open", not_mine)
        with (
            pytest.raises(InUseError, match=f"is being written by process {process.pid} "),
            exclusive(path),
        ):
            pass
    with exclusive(path):  # its holder has ended
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())

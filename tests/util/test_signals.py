"""Exit codes of processes that are stopped at moments that matter."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from softcache.util.signals import deferred_stop

INTERRUPTED_IMPORT = """
    import sys
    from softcache.util.signals import forget_interrupt
    try:
        exec("raise KeyboardInterrupt")  # as in the import of a module that defines dataclasses
    except KeyboardInterrupt:
        {forget}
    sys.exit(143)
"""


@pytest.mark.parametrize(
    ("forget", "code"), [("forget_interrupt()", 143), ("pass", -signal.SIGINT)]
)
def test_an_interrupt_within_exec_does_not_replace_the_exit_code(
    forget: str, code: int, tmp_path: Path
) -> None:
    program = textwrap.dedent(INTERRUPTED_IMPORT).format(forget=forget)
    (tmp_path / "interrupted.py").write_text(program)
    command = [sys.executable, "-m", "interrupted"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == code


def test_ctrl_c_while_modules_are_imported_shows_no_traceback() -> None:
    program = """
    import os, signal, sys
    from importlib.abc import MetaPathFinder
    from softcache.__main__ import main

    class Interrupting(MetaPathFinder):
        def find_spec(self, name, *_):
            if name == "softcache.cli.app":
                os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Interrupting())
    main()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGINT
    assert run.stderr == ""


def test_a_stop_is_forgotten_where_nothing_is_left_to_stop() -> None:
    with deferred_stop(resend=False) as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt, match=r"^$"), deferred_stop():
        signal.raise_signal(signal.SIGINT)


def test_a_stop_is_not_forgotten_if_the_block_fails() -> None:
    def fail() -> None:
        with deferred_stop(resend=False):
            signal.raise_signal(signal.SIGINT)
            raise OSError("disk full")

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        fail()

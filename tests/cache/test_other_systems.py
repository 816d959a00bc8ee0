"""What other systems lack is taken away: the same files are written as on macOS, and read as on Windows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from softcache.cache import Cache
from softcache.dump.config import DumpConfig

# what macOS does not have, and what Windows does not have
MACOS = ("fdatasync", "posix_fallocate")
WINDOWS = (*MACOS, "pread", "pwrite", "O_NONBLOCK", "O_NOFOLLOW", "fork", "register_at_fork")
PROGRAM = """
import os, signal, sys
names, windows, arguments = sys.argv[1].split(","), sys.argv[2] == "windows", sys.argv[3:]
import softcache.cli.app, torch  # some libraries need them while they are imported
for name in names:
    if hasattr(os, name):
        delattr(os, name)
if windows:
    sys.modules["fcntl"] = None
    del signal.SIGHUP, signal.SIGBUS
    for module in ("softcache.util.lock", "softcache.util.signals"):
        sys.modules.pop(module, None)
from softcache.cli.app import main
for words in " ".join(arguments).split(" ; "):
    print(words)
    main(words.split(), standalone_mode=False)
"""


def run(folder: Path, system: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    names = ",".join(WINDOWS if system == "windows" else MACOS)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, names, system, *arguments], cwd=folder, text=True,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip


def test_a_dump_without_fdatasync_and_fallocate_has_the_same_bytes(
    dump_config: DumpConfig, cache: Cache, tmp_path: Path
) -> None:
    result = run(
        tmp_path, "macos", "dump", "--teacher", str(dump_config.teacher), "--data", dump_config.data,
        "--eval-data", str(dump_config.eval_data), "--temperature", "4", "--batch-size", "64", "-o", "mac.h5",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mac.h5").read_bytes() == cache.path.read_bytes()


def test_a_cache_is_read_without_what_windows_lacks(
    dump_config: DumpConfig, cache: Cache, tmp_path: Path
) -> None:
    train = f"train tiny.h5 --data {dump_config.data} --student mlp:4 --epochs 1 -o run"
    commands = ["info tiny.h5", "verify tiny.h5", "export-labels tiny.h5 -o labels.npy", train]
    result = run(tmp_path, "windows", *" ; ".join(commands).split())
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "student.safetensors").exists()

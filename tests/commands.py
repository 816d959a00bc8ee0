"""Commands in processes of their own, which are forked from one that has imported torch already.

An import of torch and of the two loops takes 1.5 s of a core, for each of the many commands that tests run.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = ["softcache.cli.app", "softcache.dump.loop", "softcache.train.loop", "torch.optim"]
TIMEOUT = 120  # seconds
# the command line, which waits less for a batch after a signal to stop
IMPATIENT = (
    "from softcache.util import signals; signals.GRACE = 0.5; "
    "from softcache.__main__ import main; main()"
)


def softcache(
    arguments: Sequence[str | Path], folder: Path, *, processes: int = 1, threads: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `softcache ARGUMENTS` in a folder.

    Args:
        processes: how many run it together, as torchrun would start them.
        threads: of each; by default as many as torch takes.

    Returns:
        The first exit code that is not 0, and what all of them printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    command = [*map(str, arguments)]
    port = free_port() if processes > 1 else 0
    with TemporaryDirectory() as temporary:
        texts = [
            [Path(temporary) / f"{stream}{rank}" for rank in range(processes)]
            for stream in ("output", "errors")
        ]
        started = []
        for rank, (output, errors) in enumerate(zip(*texts, strict=True)):
            environment = dict(os.environ) | (launched(rank, processes, port) if port else {})
            streams = {1: output, 2: errors}
            process = context.Process(
                target=_command, args=(command, folder, environment, streams, threads)
            )
            process.start()
            started.append(process)
        for process in started:
            process.join(TIMEOUT)
            if process.exitcode is None:
                process.kill()
                raise subprocess.TimeoutExpired(command, TIMEOUT)
        codes = [process.exitcode or 0 for process in started]
        code = next((code for code in codes if code), 0)
        output, errors = ("".join(path.read_text() for path in paths) for paths in texts)
    return subprocess.CompletedProcess(["softcache", *command], code, output, errors)


def launched(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun sets for one of its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    streams: Mapping[int, Path],
    threads: int | None,
) -> None:
    import torch

    from softcache.__main__ import main

    for descriptor, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    sys.argv = ["softcache", *arguments]
    main()

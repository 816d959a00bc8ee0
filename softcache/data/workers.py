"""Worker processes that load data: started by fork or spawn, stopped by their parent, missed when killed."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch.utils.data import Dataset

from softcache.errors import DataError
from softcache.util.callables import import_again, imported_files

GRACE = 3.0  # seconds


class Portable(Dataset[Any]):
    """A Dataset that can be sent to a process that was not forked from this one.

    The user's own files are imported there first, under the names that they have here.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style

    def __getitems__(self, request: Any) -> Any:  # noqa: ANN401  # a Request, and a Batch
        return self.dataset.__getitems__(request)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            contents = pickle.dumps(self.dataset)
        except Exception as error:  # a user's object can fail in any way
            raise DataError(
                f"the data cannot be sent to worker processes ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}); this system starts them without fork: keep open "
                "files, locks and lambdas out of the Dataset, or use --workers 0"
            ) from error
        return _received, (imported_files(), contents)


def _received(files: dict[str, str], contents: bytes) -> Portable:
    for name, path in files.items():
        import_again(name, path)
    # pickle runs code, but these bytes come from the process that started this one, and from no file
    return Portable(pickle.loads(contents))


def start_worker(worker: int) -> None:
    """Leave it to the parent to stop this worker: Ctrl-C and SIGTERM also reach the workers of a job.

    SIGTERM ends it after GRACE seconds: multiprocessing sends that to a worker that hangs.
    """
    signalled: list[int] = []

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if signalled or os.getppid() == 1:
            os._exit(128 + number)
        signalled.append(number)
        timer = threading.Timer(GRACE, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)


def is_worker_failure(error: BaseException) -> bool:
    """Whether torch says that a worker process has ended; it may say so at any time, whatever is running."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@contextmanager
def worker_failures() -> Iterator[None]:
    """Turn torch's error about a worker process that ended into a DataError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_worker_failure(error):
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"a process that loads data was stopped from outside ({reason}); the system does this when "
            "memory runs out: use fewer --workers, then run the same command again, which continues"
        ) from error

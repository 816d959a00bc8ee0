"""The processes that fill one cache file together, started by torchrun or accelerate launch.

They share only a small key-value store, torch.distributed's own, which holds the counters that hand
out work and the barriers at which all processes wait. A single process needs no store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from softcache.errors import SoftcacheError
from softcache.util.distributed import local_world_size, world_size

POLL_INTERVAL = timedelta(seconds=1)  # how often a waiting process checks that no other has failed


@dataclass
class ProcessGroup:
    """One of `size` processes on this host.

    Attributes:
        store: shared by all processes; None if there is only one.
    """

    rank: int = 0
    size: int = 1
    store: Any = None  # torch.distributed.Store
    _barriers: int = field(default=0, init=False)
    _seen_rows: int = field(default=0, init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def first(self) -> bool:
        """Whether this process does the work that must be done only once."""
        return self.rank == 0

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter that all processes share; returns its new value."""
        if self.store is None:
            self._counts[counter] = self._counts.get(counter, 0) + amount
            return self._counts[counter]
        return int(self.store.add(counter, amount))

    def add_rows(self, amount: int) -> int:
        """Count rows as done; returns how many all processes have done since the previous call."""
        total = self.add("rows", amount)
        new_rows, self._seen_rows = total - self._seen_rows, total
        return new_rows

    def broadcast(self, name: str, value: int) -> int:
        """Return the first process's value in every process; the others wait for it."""
        if self.store is not None and self.first:
            self.store.set(name, str(value))
        self.barrier()
        return value if self.store is None else int(self.store.get(name))

    def barrier(self) -> None:
        """Wait until all processes have reached this point.

        Raises:
            SoftcacheError: another process has failed; its own message says why.
        """
        self._barriers += 1
        if self.store is None:
            return
        gate = f"gate {self._barriers}"
        if self.add(f"arrived {self._barriers}", 1) == self.size:
            self.store.set(gate, "open")
        while not self._is_set(gate):
            if self.store.check(["failed"]):
                raise SoftcacheError(
                    "another process of this job has failed; see its error message"
                )

    def fail(self) -> None:
        """Tell the other processes that this one has failed."""
        if self.store is not None:
            self.store.set("failed", str(self.rank))

    def _is_set(self, key: str) -> bool:
        try:
            self.store.wait([key], POLL_INTERVAL)
        except RuntimeError:  # DistStoreError: not set within the interval
            return False
        return True


def join_processes() -> ProcessGroup:
    """The process group described by torchrun's environment variables, or a single process.

    Raises:
        SoftcacheError: the processes run on several hosts, which cannot fill one file.
    """
    size = world_size()
    if size == 1:
        return ProcessGroup()
    local_size = local_world_size()
    if local_size != size:
        raise SoftcacheError(
            f"{size} processes, but only {local_size} on this host; expected one host, since hosts "
            "cannot share a file: dump a part of the samples on each with --shard I/N, then run "
            "softcache merge"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    return ProcessGroup(rank, size, PrefixStore("softcache", store))

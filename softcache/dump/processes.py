"""The processes that fill one file together, as torchrun or accelerate launch starts them.

They share nothing but a small key-value store, torch.distributed's own: a counter that hands out
work, and the moments at which all wait for all. One process alone needs none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from softcache.errors import SoftcacheError
from softcache.util.distributed import local_world_size, world_size

PATIENCE = timedelta(seconds=5)  # between two looks at whether another process has failed


@dataclass
class ProcessGroup:
    """One of `size` processes on this host; `store` is theirs together, None for one alone."""

    rank: int = 0
    size: int = 1
    store: Any = None  # torch.distributed.Store
    _met: int = field(default=0, init=False)
    _seen_rows: int = field(default=0, init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that does what is to be done once."""
        return self.rank == 0

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter of all processes; returns what it comes to."""
        if self.store is None:
            self._counts[counter] = self._counts.get(counter, 0) + amount
            return self._counts[counter]
        return int(self.store.add(counter, amount))

    def add_rows(self, amount: int) -> int:
        """Count rows as done; returns how many all processes have done since this was last asked."""
        total = self.add("rows", amount)
        news, self._seen_rows = total - self._seen_rows, total
        return news

    def broadcast(self, name: str, value: int) -> int:
        """What the first process says; the others wait for it."""
        if self.store is not None and self.first:
            self.store.set(name, str(value))
        self.barrier()
        return value if self.store is None else int(self.store.get(name))

    def barrier(self) -> None:
        """Wait until all processes are here.

        Raises:
            SoftcacheError: one of them has failed, and says why itself.
        """
        self._met += 1
        if self.store is None:
            return
        gate = f"gate {self._met}"
        if self.add(f"arrived {self._met}", 1) == self.size:
            self.store.set(gate, "open")
        while not self._is_set(gate):
            if self.store.check(["failed"]):
                raise SoftcacheError("another process of this job has failed; its message says why")

    def fail(self) -> None:
        """Let the others know that this process has failed."""
        if self.store is not None:
            self.store.set("failed", str(self.rank))

    def _is_set(self, key: str) -> bool:
        try:
            self.store.wait([key], PATIENCE)
        except RuntimeError:  # DistStoreError: not within the time
            return False
        return True


def join_processes() -> ProcessGroup:
    """The group that the environment names, as torchrun sets it; one process alone otherwise.

    Raises:
        SoftcacheError: the processes are on several hosts, which cannot fill one file.
    """
    size = world_size()
    if size == 1:
        return ProcessGroup()
    here = local_world_size()
    if here != size:
        raise SoftcacheError(
            f"{size} processes, of which {here} on this host; a file is filled by the processes of one "
            "host: give each host a part of the samples with --shard i/n, then softcache merge"
        )
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    return ProcessGroup(rank, size, PrefixStore("softcache", store))

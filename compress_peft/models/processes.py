"""Several processes that share one walk over the blocks, as torchrun or accelerate launch starts them.

Each runs its part of the calibration through its own copy of the block; statistics are added up over all of them, so
that each goes on with the same numbers. What is done by name (the layers of a block) is divided and handed round.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compress_peft.errors import ConfigError, Problem

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """Those that do something together; by itself, one process alone."""

    rank: int = 0
    count: int = 1
    on_machine: int = 1
    """How many of them run on this machine, and share its memory."""

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0

    def part(self, samples: Tensor) -> Tensor:
        """The rows that this process takes.

        Raises:
            ConfigError: there are fewer than processes.
        """
        if self.count > len(samples):
            what = f"{len(samples)} samples are too few for {self.count} processes"
            raise ConfigError(Problem("calibration", what, "give more samples, or start fewer processes"))
        return samples.tensor_split(self.count)[self.rank]

    def add_up(self, tensor: Tensor) -> None:
        """In place: the sum over all processes, the same bits in each."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def gather(self, value: Value) -> list[Value]:
        """What each process has, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Value) -> Value:
        """What the first process has."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def divide(self, sizes: Mapping[Any, float]) -> set[Any]:
        """The keys that fall to this process, so that all have about as much to do."""
        loads = [0.0] * self.count
        mine = set()
        for key in sorted(sizes, key=lambda key: -sizes[key]):  # sorting is stable: the same in every process
            least = loads.index(min(loads))
            loads[least] += sizes[key]
            if least == self.rank:
                mine.add(key)
        return mine


ALONE = Processes()

_working_alone: ContextVar[bool] = ContextVar("working_alone", default=False)


def current() -> Processes:
    """All that torch.distributed knows of, but inside `alone`."""
    if _working_alone.get() or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    count = dist.get_world_size()
    return Processes(dist.get_rank(), count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


@contextmanager
def alone() -> Iterator[None]:
    """For work that this process does while the others wait."""
    token = _working_alone.set(True)
    try:
        yield
    finally:
        _working_alone.reset(token)


def local_rank() -> int | None:
    """Which of the processes on this machine this is; None if it was not started as one of several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return int(os.environ.get("LOCAL_RANK", 0)) if several else None


def join() -> Processes:
    """Meet the processes that were started together with this one, if any."""
    rank = local_rank()
    if rank is not None and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        # Whoever waits for the first process may wait for hours.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))
    return current()


def leave() -> None:
    """The end of `join`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

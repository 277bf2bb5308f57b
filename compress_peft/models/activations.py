"""Calibration activations between two blocks: in memory up to a limit, the rest on disk."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress_peft.errors import CorruptFile, Problem
from compress_peft.models.shards import disk_error, raw_bytes, read_into


@dataclass
class Budget:
    """Bytes of memory that several lists share."""

    left: float


@dataclass(frozen=True)
class _OnDisk:
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Activations(MutableSequence[Tensor]):
    """Chunks (rows, length, hidden). Those beyond the budget lie in files of `folder`, one each, bit for bit; they are
    read and written whole, not mapped, so that what is not in use takes no memory at all."""

    def __init__(self, folder: Path, budget: Budget):
        self.folder = folder
        self.budget = budget
        self.items: list[Tensor | _OnDisk] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        item = self.items[index]
        if isinstance(item, Tensor):
            return item
        tensor = torch.empty(item.shape, dtype=item.dtype)
        try:
            with item.path.open("rb") as file:
                read_into(file, tensor)
        except (OSError, EOFError) as error:
            what = f"activations cannot be read back: {error}"
            raise CorruptFile(Problem(str(item.path), what, "start again: finished blocks are kept")) from error
        return tensor

    def __setitem__(self, index: int, states: Tensor) -> None:  # type: ignore[override]
        """Kept where the chunk before it was."""
        item = self.items[index]
        self.items[index] = states if isinstance(item, Tensor) else self._write(item.path, states)

    def insert(self, index: int, states: Tensor) -> None:
        assert index == len(self.items), "chunks come in order"
        size = states.numel() * states.element_size()
        if size <= self.budget.left:
            self.budget.left -= size
            self.items.append(states)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.items.append(self._write(self.folder / f"{id(self):x}-{index}.bin", states))

    def __delitem__(self, index: int | slice) -> None:
        raise NotImplementedError

    def extend(self, states: Iterable[Tensor]) -> None:
        for item in states:
            self.append(item)

    def _write(self, path: Path, states: Tensor) -> _OnDisk:
        try:
            with path.open("wb") as file:
                file.write(raw_bytes(states))
        except OSError as error:
            raise disk_error(error, path) from error
        return _OnDisk(path, tuple(states.shape), states.dtype)

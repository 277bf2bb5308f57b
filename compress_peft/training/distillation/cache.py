"""The teacher's top-k log-probabilities on disk, so that teacher and student need not be in memory together.

    FOLDER/shard-00000.safetensors ...      rows in a fixed order, ROWS_PER_SHARD each
        ids         (positions, k) int32        tokens, likeliest first
        log_probs   (positions, k + 1) float32  of these tokens, and of all others together
        starts      (rows + 1,) int64           where each row's positions start

A shard appears whole or not at all and says in its header what it belongs to and what its tensors' checksum is: a
killed run goes on with the first missing shard. Only positions that predict a target are stored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from compress_peft.errors import CorruptFile, Problem
from compress_peft.training.batches import IGNORED, Batch, TokenPair, collate
from compress_peft.training.distillation.events import Events
from compress_peft.training.distillation.rows import batch_keys, row_key

ROWS_PER_SHARD = 64
FORMAT = "1"
_NAMES = ("ids", "log_probs", "starts")


def position_bytes(top_k: int) -> int:
    """Disk that one predicted token takes."""
    return 4 * top_k + 4 * (top_k + 1)


class TeacherCache:
    """The rows of one data set with one teacher's scores.

    identity: what the scores depend on beside the rows: teacher, temperature, vocabulary.
    """

    def __init__(self, folder: Path, rows: Sequence[TokenPair], identity: dict[str, Any], top_k: int):
        self.folder = folder
        self.top_k = top_k
        self.rows = list({row_key(*row): row for row in rows}.values())  # each different one once
        self._places = {row_key(*row): index for index, row in enumerate(self.rows)}
        digest = hashlib.sha256(json.dumps([FORMAT, top_k, identity], sort_keys=True).encode())
        for key in self._places:
            digest.update(key)
        self.key = digest.hexdigest()
        self._shards: list[Any] = []

    @property
    def shards(self) -> int:
        return -(-len(self.rows) // ROWS_PER_SHARD)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not written yet."""
        return [shard for shard in range(self.shards) if not self.path(shard).exists()]

    def size(self) -> int:
        """Bytes on disk."""
        return sum(self.path(shard).stat().st_size for shard in range(self.shards) if self.path(shard).exists())

    @torch.no_grad()
    def fill(self, score: Callable[[Batch], Events], pad_id: int, batch_size: int, device: torch.device) -> None:
        """Write the missing shards. score: the teacher's events at the N positions that predict a batch's targets."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard in tqdm(self.missing(), desc="teacher", unit="shard"):
            rows = self.rows[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]
            ids, log_probs, counts = [], [], [0]
            for start in range(0, len(rows), batch_size):
                batch = collate(rows[start : start + batch_size], pad_id)
                events = score(batch.to(device))
                assert events.ids is not None, "the cache needs k below the vocabulary's size"
                ids.append(events.ids.to("cpu", torch.int32))
                log_probs.append(events.log_probs.cpu())
                counts += (batch.targets != IGNORED).sum(1).tolist()
            tensors = {
                "ids": torch.cat(ids),
                "log_probs": torch.cat(log_probs),
                "starts": torch.tensor(counts, dtype=torch.int64).cumsum(0),
            }
            header = {"scores": json.dumps({"key": self.key, "sha256": _checksum(tensors)})}
            scratch = self.path(shard).with_suffix(".part")
            with scratch.open("wb") as stream:
                stream.write(save(tensors, header))
                stream.flush()
                os.fsync(stream.fileno())
            scratch.replace(self.path(shard))

    def open(self) -> None:
        """Check every shard and map it into memory.

        Raises:
            CorruptFile: one is missing, damaged, or of another teacher or text.
        """
        problems = [problem for shard in range(self.shards) if (problem := self._problem(shard)) is not None]
        if problems:
            raise CorruptFile(problems)
        self._shards = [safe_open(self.path(shard), "pt") for shard in range(self.shards)]

    def _problem(self, shard: int) -> Problem | None:
        path = self.path(shard)
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("scores", "{}"))
                sound = header.get("sha256") == _checksum({name: file.get_tensor(name) for name in _NAMES})
        except (SafetensorError, OSError, ValueError) as error:
            return Problem(str(path), f"cannot be read: {error}", "delete it and run again: it is scored again then")
        if not sound:
            return Problem(str(path), "its checksum is wrong", "delete it and run again: it is scored again then")
        if header.get("key") != self.key:
            what = "holds scores of another teacher, other text or other settings"
            return Problem(str(path), what, "give another folder under cache, or delete this one")
        return None

    def events(self, batch: Batch) -> Events:
        """The teacher's events at the positions that predict the batch's targets."""
        assert self._shards or not self.rows, "open() comes first"
        ids, log_probs = [], []
        for key in batch_keys(batch):
            shard, place = divmod(self._places[key], ROWS_PER_SHARD)
            file = self._shards[shard]
            start, end = file.get_slice("starts")[place : place + 2].tolist()
            ids.append(file.get_slice("ids")[start:end])
            log_probs.append(file.get_slice("log_probs")[start:end])
        device = batch.input_ids.device
        return Events(torch.cat(log_probs).to(device), torch.cat(ids).to(device, torch.int64))


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()

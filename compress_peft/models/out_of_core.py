"""A block walk over a model that is never in memory as a whole: blocks come from safetensors and go back changed.

    walk_folder(source, target, make_job, dtype=torch.float32, calibration=ids, tokenizer=tokenizer)

Every finished block is a file of its own in a work folder, with its checksum in progress.json. Started again after a
kill, the walk goes on at the first block that is not finished: the activations that enter it are worked out again from
the finished blocks, which gives the same bits, so that there is no state on disk that could disagree with the blocks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from compress_peft.errors import ConfigError, CorruptFile, ModelError, Problem
from compress_peft.models.activations import Activations, Budget
from compress_peft.models.empty import empty_model, match_folder, stored_names
from compress_peft.models.hf_quantizer import CompressedConfig
from compress_peft.models.layers import decoder_layers, is_encoder_decoder
from compress_peft.models.needs import Needs, check_room, estimate_walk
from compress_peft.models.processes import ALONE, Processes, current
from compress_peft.models.shards import INDEX, disk_error, read_header, write_shard, write_tensors
from compress_peft.models.verify import MANIFEST, sha256, verify_folder, write_manifest
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.tensors.finite import all_finite
from compress_peft.weights import CompressedWeight
from compress_peft.weights.inference import use_kernels
from compress_peft.weights.storage import Spec, join_weight, split_state_dict

ACTIVATIONS_IN_MEMORY = 1 << 30
"""Bytes of calibration activations that stay in memory; the rest goes to disk, bit for bit."""

PROGRESS = "progress.json"


class Job(Protocol):
    """A consumer of the walk whose results survive a kill."""

    layers: dict[str, nn.Linear]
    """The layers that are changed, by full name."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics, as `BlockWalk` takes them."""

    @property
    def copies(self) -> tuple[float, bool]:
        """Of a block's weights, and whether its activations are kept, as `estimate_walk` takes them."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON: what must be equal for a walk to go on where another one stopped."""

    def process(self, turn: BlockTurn) -> None:
        """Change the block."""

    def record(self, block: str) -> dict[str, Any]:
        """JSON: what was done with the block."""

    def restore(self, record: dict[str, Any]) -> None:
        """Take back what `record` gave."""

    def stored_bits(self, shape: tuple[int, int]) -> float:
        """Bits per weight of a changed layer (out, in), for the estimate."""


class FolderStore:
    """Blocks of a model on the meta device, from one folder of safetensors into another.

    Raises:
        ModelError: the folder's tensors are not those of the model.
        CorruptFile: files are missing or damaged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Path,
        work: Path,
        activation_bytes: float,
        processes: Processes = ALONE,
    ):
        """activation_bytes: in memory, of all processes on this machine together."""
        self.model = model
        self.work = work
        self.folder = work / "model"
        self.spill = work / "activations" / str(processes.rank)
        self.budget = Budget(activation_bytes / processes.on_machine)
        self.blocks = [name for name, _ in decoder_layers(model)]
        self.names: dict[str, list[str]] = {name: [] for name in ["", *self.blocks]}
        """The stored tensors by block; of tied ones only the first."""
        for name in stored_names(model):
            self.names[self._home(name)].append(name)
        self.places, self.notes = match_folder(model, source)
        self.done: dict[str, dict[str, Any]] = {}
        """By block: file, sha256, specs of compressed weights, record of the job."""

    def _home(self, name: str) -> str:
        return next((block for block in self.blocks if name.startswith(block + ".")), "")

    def file(self, block: str) -> str:
        """The name of a block's file; the first file has what is outside of the blocks."""
        number = self.blocks.index(block) + 2 if block else 1
        return f"model-{number:05d}-of-{len(self.blocks) + 1:05d}.safetensors"

    # What the walk asks for.

    def load(self, name: str, original: bool) -> None:
        if original or name == "":
            for key in self._wanted(name):
                self._set(key, self._read(key))
            return
        entry = self.done[name]
        found = {key: place.read() for key, place in read_header(self.folder / entry["file"]).items()}
        for key, spec in entry["specs"].items():
            parts = {part: found.pop(part) for part in list(found) if part == key or part.startswith(key + ".")}
            self._set(key, join_weight(key, spec, parts))
        for key, tensor in found.items():
            self._set(key, tensor)

    def free(self, name: str) -> None:
        for key in self._wanted(name):
            old = self.model.get_parameter_or_buffer(key)
            self._set(key, torch.empty(old.shape, dtype=old.dtype, device="meta"))

    def finished(self, name: str) -> bool:
        return name in self.done

    def activations(self) -> MutableSequence[Tensor]:
        return Activations(self.spill, self.budget)

    # What the driver asks for.

    def write(self, block: str, record: dict[str, Any]) -> None:
        """The block as it is now, and the fact that it is finished."""
        tensors, specs = split_state_dict(self.model.get_submodule(block))
        digest = write_tensors(self.folder / self.file(block), {f"{block}.{k}": t for k, t in tensors.items()})
        self._finish(block, digest, {f"{block}.{key}": spec for key, spec in specs.items()}, record)

    def write_outside(self) -> None:
        """What is outside of the blocks, a tensor at a time."""
        model = self.model
        tensors = {}
        for name in self.names[""]:
            like = model.get_parameter_or_buffer(name)
            tensors[name] = (like.dtype, tuple(like.shape), lambda name=name: self._read(name))
        self._finish("", write_shard(self.folder / self.file(""), tensors), {}, {})

    def read_progress(self, identity: dict[str, Any]) -> None:
        """Find out what an earlier walk finished; files that do not match their checksums count as not finished.

        Raises:
            ConfigError: that walk was another one.
        """
        self.identity = identity
        path = self.work / PROGRESS
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.work / "activations", ignore_errors=True)
        if path.exists():
            self._take_over(path, identity)
        finished = {entry["file"] for entry in self.done.values()}
        for file in self.folder.iterdir():
            if file.name not in finished:
                file.unlink()

    def _take_over(self, path: Path, identity: dict[str, Any]) -> None:
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            before, done = progress["identity"], dict(progress["blocks"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFile(Problem(str(path), f"cannot be read: {error}", f"delete {self.work}")) from error
        if before != identity:
            changed = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
            what = f"holds a walk that was started with another {', '.join(changed)}"
            raise ConfigError(Problem(str(self.work), what, "go on with what it was started with, or delete it"))
        for block, entry in done.items():
            file = self.folder / entry["file"]
            if file.is_file() and sha256(file) == entry["sha256"]:
                self.done[block] = entry
            else:
                where = block or "what is outside of the blocks"
                self.notes.append(f"{file.name} ({where}) was damaged after it was written: done again")

    def finish(self, target: Path, tokenizer: Any, source: Path) -> None:
        """Index, configuration, tokenizer and manifest beside the shards; the folder takes its name as the last."""
        model = self.model
        specs: dict[str, Spec] = {}
        index: dict[str, str] = {}
        total = 0
        for block in ["", *self.blocks]:
            specs |= self.done[block]["specs"]
            places = read_header(self.folder / self.file(block))
            index |= dict.fromkeys(places, self.file(block))
            total += sum(place.bytes for place in places.values())
        config = model.config
        config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
        if specs:
            config.quantization_config = CompressedConfig(specs)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        with _telling_of_full_disks(self.folder):
            config.save_pretrained(self.folder)
            if model.can_generate():
                generation = model.generation_config
                if (source / "generation_config.json").exists():
                    generation = GenerationConfig.from_pretrained(source)
                generation.save_pretrained(self.folder)
            (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(self.folder)
            write_manifest(self.folder, "model")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.folder, target)
        shutil.rmtree(self.work)

    def _wanted(self, name: str) -> list[str]:
        """The tensors of a block; for "" those that the model needs before its first block."""
        head = self.model.get_output_embeddings()
        tied = head is not None and self.model.get_input_embeddings().weight is head.weight
        skipped = {id(tensor) for tensor in head.parameters()} if name == "" and head is not None and not tied else ()
        get = self.model.get_parameter_or_buffer
        return [key for key in self.names[name] if id(get(key)) not in skipped]

    def _read(self, name: str) -> Tensor:
        """In the model's dtype.

        Raises:
            ModelError: it has NaN or infinite values.
        """
        tensor = self.places[name].read()
        if tensor.is_floating_point():
            if not all_finite(tensor):
                fix = "the model file is damaged: get it again"
                raise ModelError(Problem(name, "has NaN or infinite weights", fix))
            tensor = tensor.to(self.model.get_parameter_or_buffer(name).dtype)
        return tensor

    def _set(self, name: str, tensor: Tensor) -> None:
        module_name, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            return
        old = module._parameters[leaf]
        trainable = tensor.is_floating_point() and not isinstance(tensor, CompressedWeight)
        parameter = nn.Parameter(tensor, requires_grad=trainable)
        module._parameters[leaf] = parameter
        if not name.startswith(tuple(f"{block}." for block in self.blocks)):
            for other in self.model.modules():  # tied to it
                for key, value in other._parameters.items():
                    if value is old and value is not None:
                        other._parameters[key] = parameter

    def _finish(self, block: str, digest: str, specs: dict[str, Spec], record: dict[str, Any]) -> None:
        self.done[block] = {"file": self.file(block), "sha256": digest, "specs": specs, "record": record}
        path = self.work / PROGRESS
        scratch = path.with_suffix(".part")
        with _telling_of_full_disks(path):
            with scratch.open("w", encoding="utf-8") as file:
                json.dump({"identity": self.identity, "blocks": self.done}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)


@contextmanager
def _telling_of_full_disks(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def walk_folder(
    source: str | Path,
    target: str | Path,
    make_job: Callable[[PreTrainedModel], Job],
    dtype: torch.dtype = torch.float32,
    calibration: Tensor | None = None,
    tokenizer: Any = None,
    work: str | Path | None = None,
    activation_bytes: float = ACTIVATIONS_IN_MEMORY,
    progress: bool = True,
    trust_remote_code: bool = False,
    on_block: Callable[[str], None] | None = None,
) -> tuple[Job, BlockWalk, list[str]]:
    """Change the model of the folder `source` block by block into the folder `target`; goes on where it was killed.

    Several processes (`processes.current`) that call it together share the walk: each has its part of the calibration
    and of the layers, and the first one writes.

    make_job: the job for the model, which has no weights yet. dtype: of the activations and of what is not
    compressed, as for a model in memory. work: the folder of unfinished work, on the disk of the target (default:
    beside it). on_block: called with the name of every block that was finished now. Returns the job, the walk (for its
    times) and notes.

    Raises:
        ConfigError: the work folder holds another walk.
        ModelError: the target exists; the model's tensors do not fit; or NaN in weights or calibration.
        CorruptFile: files of the source are missing or damaged.
        MissingRequirement: too little memory or disk, with the figures; finished blocks are kept.
    """
    source, target = Path(source), Path(target)
    work = Path(work) if work is not None else target.with_name(f".{target.name}.partial")
    if target.exists():
        raise ModelError(Problem(str(target), "exists already and is not overwritten", "choose another folder"))
    if (source / MANIFEST).exists():
        verify_folder(source)
    model = empty_model(source, dtype, trust_remote_code)
    if calibration is not None and is_encoder_decoder(model):
        what = "its decoder needs what its encoder puts out, and the walk from disk has one block at a time"
        raise ModelError(
            Problem(type(model).__name__, what, "leave out_of_core out, or use a method without calibration")
        )
    use_kernels(model)  # as in memory: the same sums in the same order
    processes = current()
    store = FolderStore(model, source, work, activation_bytes, processes)
    job = make_job(model)
    if processes.leads:
        store.read_progress(_identity(store, job, dtype, calibration, processes))
        needed = _needed(model, job, dtype, calibration, activation_bytes, processes)
        check_room(needed, work, sum((store.folder / entry["file"]).stat().st_size for entry in store.done.values()))
        if "" not in store.done:
            store.write_outside()
    store.done = processes.from_first(store.done)
    for block in store.blocks:
        if block in store.done:
            job.restore(store.done[block]["record"])
    walk = BlockWalk(model, calibration, job.layers, progress, job.needs, store, processes)
    for turn in walk:
        job.process(turn)
        if processes.leads:
            store.write(turn.name, job.record(turn.name))
            if on_block is not None:
                on_block(turn.name)
    if processes.leads:
        store.finish(target, tokenizer, source)
    processes.from_first(None)  # when this comes, the target is there
    return job, walk, store.notes


def _needed(
    model: PreTrainedModel, job: Job, dtype: torch.dtype, calibration: Tensor | None, limit: float, processes: Processes
) -> Needs:
    """Of all processes on this machine."""
    samples, length = (0, 0) if calibration is None else calibration.shape

    def estimate(rows: int, limit: float) -> Needs:
        tokens = (rows, length)
        return estimate_walk(model, job.layers, job.stored_bits, dtype.itemsize, tokens, job.needs, limit, *job.copies)

    many = processes.on_machine
    each = estimate(math.ceil(samples / processes.count), limit / many)
    return Needs(each.memory * many, estimate(samples, limit).disk)


def _identity(
    store: FolderStore, job: Job, dtype: torch.dtype, calibration: Tensor | None, processes: Processes
) -> dict[str, Any]:
    files = sorted({place.file for place in store.places.values()})
    config = json.loads(json.dumps(store.model.config.to_dict(), default=str))
    config.pop("_name_or_path", None)
    return {
        "model files": {file.name: file.stat().st_size for file in files},
        "model configuration": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "dtype": str(dtype),
        "calibration": None if calibration is None else hashlib.sha256(calibration.numpy().tobytes()).hexdigest(),
        **({"number of processes": processes.count} if processes.count > 1 else {}),  # sums are not the same bits
        **job.identity,
    }

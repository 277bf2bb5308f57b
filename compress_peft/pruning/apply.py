"""A pruner applied to a model, block by block."""

from __future__ import annotations

import fnmatch
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress_peft.errors import ConfigError, ModelError, Problem
from compress_peft.models.hf_quantizer import attach
from compress_peft.models.jobs import LayerJob, LayerRecord, measure_change
from compress_peft.models.out_of_core import ACTIVATIONS_IN_MEMORY, FolderStore, walk_folder
from compress_peft.models.processes import current
from compress_peft.models.selection import matching, select_layers
from compress_peft.models.sparsity import UNSTRUCTURED, pruned_layers, pruning_pattern, record_pruning
from compress_peft.models.walk import BlockTurn, BlockWalk, InputStatistics
from compress_peft.pruning.base import Pruner, Sparsity
from compress_peft.pruning.owl import count_outliers, owl_sparsity
from compress_peft.tensors.finite import all_finite
from compress_peft.tensors.masks import parse_pattern
from compress_peft.weights import CompressedWeight


@dataclass(frozen=True)
class PrunedLayer(LayerRecord):
    sparsity: float
    """Share of the weights that are zero."""
    bits_per_weight: float | None = None
    """Where the layer was quantized in the same sweep."""


@dataclass(frozen=True)
class PruningSummary:
    """What was done, for the report."""

    method: str
    settings: dict
    layers: tuple[PrunedLayer, ...]
    left_alone: tuple[tuple[str, str], ...]
    """(layer, reason) of every linear layer that was not touched."""
    notes: tuple[tuple[str, str], ...] = ()
    """(layer, what was unusual)."""
    outliers: dict[str, float] | None = None
    """With OWL: the share of outliers by block."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by kind: prune; with calibration also forward and statistics."""

    @property
    def sparsity(self) -> float:
        """Over the weights of all pruned layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        return sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / sum(sizes)

    @property
    def relative_error(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)


def prune_model(
    model: nn.Module, pruner: Pruner, calibration: Tensor | None = None, progress: bool = True
) -> PruningSummary:
    """Prune the selected linear layers in place; later blocks see the outputs of the pruned ones.

    Processes of torch.distributed that call it together, with the same model and calibration, share the passes over
    the calibration.
    calibration: (samples, length) int64 token ids, all of them real tokens; for pruners that need it.

    Raises:
        ConfigError: the pruner needs calibration and gets none.
        DataError: the calibration does not fit the model.
        ModelError: a pattern matches no layer, or layers cannot be pruned (all are named); nothing was changed. Or
            calibration shows NaN inside the model: blocks before that are pruned already.
    """
    _refuse_without(pruner, calibration)
    chosen, left_alone = select_layers(model, pruner.targets, pruner.skip, "pruned")
    check_layers(chosen, pruner)
    owners: dict[int, str] = {}
    for name, layer in chosen:
        owners.setdefault(id(layer.weight), name)
    layers = {name: layer for name, layer in chosen if owners[id(layer.weight)] == name}
    followers = [(name, layer, owners[id(layer.weight)]) for name, layer in chosen if name not in layers]
    walks = []
    outliers = None
    if pruner.allocation == "owl":
        walks.append(BlockWalk(model, calibration, layers, progress, ("norms",), processes=current()))
        outliers = count_outliers(walks[0], pruner.owl_m)
    work = Pruning(pruner, layers, outliers)
    given = calibration if pruner.needs else None
    walks.append(BlockWalk(model, given, layers, progress, pruner.needs, processes=current()))
    walks[-1].run(work)
    for name, layer, owner in followers:
        layer.weight = layers[owner].weight
        work.done[name] = replace(work.done[owner], name=name)
    record_as_pruned(model, pruner, [name for name, _ in chosen])
    attach(model)
    return work.summary([name for name, _ in chosen], left_alone, walks)


def prune_folder(
    source: str | Path, target: str | Path, pruner: Pruner, calibration: Tensor | None = None, **options: Any
) -> PruningSummary:
    """`prune_model` from folder to folder with one block in memory at a time; the same call goes on after a kill.

    options: of `walk_folder` (dtype, tokenizer, work, activation_bytes, progress, ...).

    Raises:
        ConfigError, DataError, ModelError: as `prune_model`, before the first block wherever shapes tell; and those of
            `walk_folder`.
    """
    _refuse_without(pruner, calibration)
    left_alone: list[tuple[str, str]] = []
    walks = []

    def make(model: PreTrainedModel) -> Pruning:
        chosen, others = select_layers(model, pruner.targets, pruner.skip, "pruned")
        left_alone.extend(others)
        check_layers(chosen, pruner, values=False)
        layers, outliers = dict(chosen), None
        if pruner.allocation == "owl":
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=Path(target).parent) as scratch:
                store = FolderStore(model, Path(source), Path(scratch), ACTIVATIONS_IN_MEMORY, current())
                show = options.get("progress", True)
                walks.append(BlockWalk(model, calibration, layers, show, ("norms",), store, current()))
                outliers = count_outliers(walks[0], pruner.owl_m)
        record_as_pruned(model, pruner, list(layers))
        return Pruning(pruner, layers, outliers)

    given = calibration if pruner.needs else None
    work, walk, notes = walk_folder(source, target, make, calibration=given, **options)
    assert isinstance(work, Pruning)
    work.notes += [("", note) for note in notes]
    return work.summary(list(work.layers), left_alone, [*walks, walk])


def _refuse_without(pruner: Pruner, calibration: Tensor | None) -> None:
    if pruner.calibrates and calibration is None:
        fix = "give calibration=token ids, or use magnitude with a uniform allocation"
        raise ConfigError(Problem(pruner.method, "needs calibration text and got none", fix))


class Pruning(LayerJob[PrunedLayer]):
    """The layers that are to be pruned, by name, and what was done with them: a consumer of the block walk."""

    record_type = PrunedLayer

    def __init__(self, pruner: Pruner, layers: dict[str, nn.Linear], outliers: dict[str, float] | None = None):
        """outliers: by block, for OWL."""
        super().__init__(layers)
        self.pruner = pruner
        self.outliers = outliers
        self.sparsity = allocate(pruner, layers, outliers)
        self.seconds = 0.0

    def process(self, turn: BlockTurn) -> None:
        """Prune the layers of this block."""
        if not turn.layers:
            return
        begin = time.monotonic()
        try:
            found = self.pruner.prune_block(turn, self.sparsity)
        except ModelError as error:
            raise ModelError([Problem(f"{turn.name} ({p.where})", p.what, p.fix) for p in error.problems]) from error
        for name, layer in turn.layers.items():
            stats = turn.statistics.get(name)
            self._replace(name, layer, *found.pop(name), stats)
            self.notes += [(name, note) for note in stats.notes] if stats is not None else []
        self.seconds += time.monotonic() - begin

    def summary(self, names: list[str], left_alone: list[tuple[str, str]], walks: list[BlockWalk]) -> PruningSummary:
        """names: of all pruned layers, in order."""
        kinds = ("forward", "statistics") if self.pruner.calibrates else ()
        return PruningSummary(
            method=self.pruner.method,
            settings=self.pruner.model_dump(mode="json"),
            layers=tuple(self.done[name] for name in names),
            left_alone=tuple(left_alone),
            notes=tuple(self.notes),
            outliers=self.outliers,
            seconds={kind: sum(walk.seconds[kind] for walk in walks) for kind in kinds} | {"prune": self.seconds},
        )

    # What a walk out of core asks for.

    @property
    def needs(self) -> tuple[str, ...]:
        return self.pruner.needs

    @property
    def copies(self) -> tuple[float, bool]:
        return self.pruner.block_copies, self.pruner.keeps_activations

    @property
    def identity(self) -> dict[str, Any]:
        return {"settings": self.pruner.model_dump(mode="json")}

    def stored_bits(self, shape: tuple[int, int]) -> float:
        dense = 8.0 * next(iter(self.layers.values())).weight.element_size()
        return self.pruner.estimate_bits(shape) or dense

    @torch.no_grad()
    def _replace(
        self, name: str, layer: nn.Linear, weight: Tensor, mask: Tensor, stats: InputStatistics | None
    ) -> None:
        old, compressed = layer.weight.detach(), isinstance(weight, CompressedWeight)
        change = (weight.dequantize(torch.float32) if isinstance(weight, CompressedWeight) else weight.float()) - old
        relative_error, output_error = measure_change(change, old, stats)
        self.done[name] = PrunedLayer(
            name=name,
            shape=(old.shape[0], old.shape[1]),
            relative_error=relative_error,
            output_error=output_error,
            sparsity=1 - int(mask.sum()) / mask.numel(),
            bits_per_weight=weight.bits_per_weight if isinstance(weight, CompressedWeight) else None,
        )
        if compressed:
            layer.weight = nn.Parameter(weight, requires_grad=False)
        else:
            layer.weight.data.copy_(weight)  # in place: layers that share it follow, a mapped file does not stay beside


def allocate(pruner: Pruner, layers: dict[str, nn.Linear], outliers: dict[str, float] | None) -> dict[str, Sparsity]:
    """What each layer gets. outliers: by block, for OWL."""
    if pruner.pattern is not None:
        return dict.fromkeys(layers, parse_pattern(pruner.pattern))
    if outliers is not None:
        blocks = {name: next(block for block in outliers if name.startswith(f"{block}.")) for name in layers}
        sizes = dict.fromkeys(outliers, 0)
        for name, layer in layers.items():
            sizes[blocks[name]] += layer.weight.numel()
        values = owl_sparsity(list(outliers.values()), list(sizes.values()), pruner.sparsity, pruner.owl_lambda)
        by_block = dict(zip(outliers, values, strict=True))
        return {name: by_block[blocks[name]] for name in layers}
    shares = pruner.allocation if isinstance(pruner.allocation, dict) else {}
    found = {name: matching(name, shares) for name in layers}
    unused = [pattern for pattern in shares if not any(fnmatch.fnmatchcase(name, pattern) for name in layers)]
    if unused:
        example = next(iter(layers))
        fix = f'layers are named like "{example}"'
        raise ModelError(
            [Problem(f"allocation.{p}", f'"{p}" matches none of the layers to prune', fix) for p in unused]
        )
    return {name: pruner.sparsity if pattern is None else shares[pattern] for name, pattern in found.items()}


def check_layers(layers: list[tuple[str, nn.Linear]], pruner: Pruner, values: bool = True) -> None:
    """values: look at the weights too, not only at their shapes.

    Raises:
        ModelError: names all layers that cannot be pruned.
    """
    problems = []
    for name, layer in layers:
        weight = layer.weight
        if isinstance(weight, CompressedWeight):
            problems.append(Problem(name, "is compressed already", "prune the original model, then quantize it"))
        elif values and weight.device.type == "meta":
            problems.append(Problem(name, "has no data (it is on the meta device)", "load the model first"))
        elif reason := pruner.check((weight.shape[0], weight.shape[1])):
            problems.append(Problem(name, reason, "change the settings or add the layer to skip"))
        elif values and not all_finite(weight.detach()):
            problems.append(Problem(name, "has NaN or infinite weights", "the model file is damaged: get it again"))
    if problems:
        raise ModelError(problems)


def record_as_pruned(model: nn.Module, pruner: Pruner, names: list[str]) -> None:
    """Leave in the model's configuration what is pruned now, with what was pruned before."""
    before, pattern = pruned_layers(model), pruner.pattern or UNSTRUCTURED
    if set(before) - set(names) and pruning_pattern(model) != pattern:
        pattern = UNSTRUCTURED
    record_pruning(model, pattern, dict.fromkeys([*before, *names]))

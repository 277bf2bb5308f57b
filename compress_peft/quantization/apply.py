"""A quantizer applied to a model, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft.errors import ConfigError, ModelError, Problem
from compress_peft.models import selection
from compress_peft.models.empty import empty_model
from compress_peft.models.hf_quantizer import attach
from compress_peft.models.jobs import LayerJob, LayerRecord, measure_change
from compress_peft.models.out_of_core import ACTIVATIONS_IN_MEMORY, FolderStore, walk_folder
from compress_peft.models.processes import current
from compress_peft.models.sparsity import kept_mask, pruned_layers, pruning_pattern
from compress_peft.models.walk import BlockTurn, BlockWalk, InputStatistics
from compress_peft.quantization.base import Quantizer
from compress_peft.quantization.smoothquant import smooth_block, with_smoothing
from compress_peft.tensors.finite import all_finite
from compress_peft.weights import CompressedWeight


@dataclass(frozen=True)
class QuantizedLayer(LayerRecord):
    bits_per_weight: float
    storage_bytes: int


@dataclass(frozen=True)
class QuantizationSummary:
    """What was done, for the report."""

    method: str
    settings: dict
    layers: tuple[QuantizedLayer, ...]
    left_alone: tuple[tuple[str, str], ...]
    """(layer, reason) of every linear layer that stayed dense."""
    notes: tuple[tuple[str, str], ...] = ()
    """(layer, what was unusual), e.g. a damping that had to be raised."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by kind: quantize (grids, codes and their errors); with calibration also forward and statistics."""
    plan: dict[str, int] = field(default_factory=dict)
    """Bits by layer, of methods that distribute them."""

    @property
    def bits_per_weight(self) -> float:
        """Over all quantized layers, all storage counted."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 8 * sum(layer.storage_bytes for layer in self.layers) / weights

    @property
    def relative_error(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)


def quantize_model(
    model: nn.Module,
    quantizer: Quantizer,
    calibration: Tensor | None = None,
    progress: bool = True,
    smooth: float | None = None,
) -> QuantizationSummary:
    """Replace the weights of the selected linear layers in place; each dense weight is freed as its turn passes.

    Layers that share one weight share the quantized one (with statistics: those of the first of them).
    Processes of torch.distributed that call it together, with the same model and calibration, share the work.
    calibration: (samples, length) int64 token ids, all of them real tokens; for quantizers that need statistics, and
    for smoothing. smooth: alpha of SmoothQuant, by which the blocks are smoothed first; None: they are not.

    Raises:
        ConfigError: the quantizer needs calibration and gets none.
        DataError: the calibration does not fit the model.
        ModelError: a pattern matches no layer, or layers cannot be quantized (all are named); nothing was changed.
            Or the values of a weight do not fit the grid's dtype, or calibration shows NaN inside the model: layers
            before that are quantized already.
    """
    _refuse_without(quantizer, calibration, smooth)
    chosen, left_alone = select_layers(model, quantizer)
    check_layers(chosen, quantizer)
    pruned, needs = _pruned(model, quantizer), quantizer.needs
    plan: Mapping[str, Quantizer] = {}
    if quantizer.plans:
        quantizer = quantizer.for_model(model, _bytes_each(model))
        plan = quantizer.plan(BlockWalk(model, calibration, dict(chosen), progress, needs, processes=current()))
    work = Replacement(quantizer, chosen, pruned, shared_parameters(model), plan, smooth)
    walk = BlockWalk(
        model, calibration if work.needs else None, dict(chosen), progress, work.needs, processes=current()
    )
    walk.run(work)
    attach(model)
    return work.summary(left_alone, walk.seconds if work.needs else {})


def quantize_folder(
    source: str | Path,
    target: str | Path,
    quantizer: Quantizer,
    calibration: Tensor | None = None,
    smooth: float | None = None,
    **options: Any,
) -> QuantizationSummary:
    """`quantize_model` from folder to folder with one block in memory at a time; the same call goes on after a kill.

    The result is what `quantize_model` and `save_model` give, tensor by tensor bit for bit, with a file for each
    block. options: of `walk_folder` (dtype, tokenizer, work, activation_bytes, progress, ...).

    Raises:
        ConfigError, DataError, ModelError: as `quantize_model`, before the first block wherever shapes tell; and those
            of `walk_folder`.
    """
    _refuse_without(quantizer, calibration, smooth)
    left_alone: list[tuple[str, str]] = []
    plan: Mapping[str, Quantizer] = {}
    if quantizer.plans:
        quantizer, plan = _plan_folder(Path(source), Path(target), quantizer, calibration, **options)

    def make(model: nn.Module) -> Replacement:
        chosen, others = select_layers(model, quantizer)
        left_alone.extend(others)
        check_layers(chosen, quantizer, values=False)
        return Replacement(quantizer, chosen, _pruned(model, quantizer), shared_parameters(model), plan, smooth)

    calibration = calibration if quantizer.needs or smooth is not None else None
    work, walk, notes = walk_folder(source, target, make, calibration=calibration, **options)
    assert isinstance(work, Replacement)
    work.notes += [("", note) for note in notes]
    return work.summary(left_alone, walk.seconds if work.needs else {})


def _plan_folder(
    source: Path, target: Path, quantizer: Quantizer, calibration: Tensor | None, **options: Any
) -> tuple[Quantizer, Mapping[str, Quantizer]]:
    """The plan from a walk of its own over the folder, which writes nothing but activations that do not fit."""
    dtype: torch.dtype = options.get("dtype", torch.float32)
    model = empty_model(source, dtype, options.get("trust_remote_code", False))
    quantizer = quantizer.for_model(model, dtype.itemsize)
    chosen, _ = select_layers(model, quantizer)
    check_layers(chosen, quantizer, values=False)
    work = Path(options.get("work") or target.with_name(f".{target.name}.partial"))
    limit, processes = options.get("activation_bytes", ACTIVATIONS_IN_MEMORY), current()
    store = FolderStore(model, source, work, limit, processes)
    walk = BlockWalk(model, calibration, dict(chosen), options.get("progress", True), quantizer.needs, store, processes)
    return quantizer, quantizer.plan(walk)


def _bytes_each(model: nn.Module) -> int:
    return next(model.parameters()).element_size()


def _refuse_without(quantizer: Quantizer, calibration: Tensor | None, smooth: float | None) -> None:
    if calibration is not None:
        return
    if quantizer.needs:
        fix = "give calibration=token ids, or use a method without calibration"
        raise ConfigError(Problem(quantizer.method, "needs calibration text and got none", fix))
    if smooth is not None:
        raise ConfigError(Problem("smooth", "needs calibration text and got none", "give calibration=token ids"))


def _pruned(model: nn.Module, quantizer: Quantizer) -> Container[str]:
    """The layers whose zeros have to stay."""
    pruned = pruned_layers(model)
    if pruned and not quantizer.keeps_zeros:
        what = f"the model is pruned ({pruning_pattern(model)}), and this method would fill its zeros"
        raise ConfigError(Problem(quantizer.method, what, "use a quantizer that keeps zeros, such as gptq"))
    return pruned


class Replacement(LayerJob[QuantizedLayer]):
    """The layers that are to be quantized, by name, and what was done with them: a consumer of the block walk."""

    record_type = QuantizedLayer

    def __init__(
        self,
        quantizer: Quantizer,
        layers: list[tuple[str, nn.Linear]],
        pruned: Container[str] = (),
        shared: Container[str] = (),
        plan: Mapping[str, Quantizer] | None = None,
        smooth: float | None = None,
    ):
        """pruned: names of the layers whose zeros have to stay. shared: of `shared_parameters`. plan: the quantizers
        of single layers, where the method gives them. smooth: of `quantize_model`."""
        super().__init__(dict(layers))
        self.quantizer = quantizer
        self.plan = plan or {}
        self.smooth = smooth
        self.pruned = pruned
        self.shared = shared
        self.sharing: dict[str, list[str]] = {}
        owners: dict[int, str] = {}
        for name, layer in layers:
            owner = owners.setdefault(id(layer.weight), name)
            self.sharing.setdefault(owner, []).append(name)
        self.seconds: dict[str, float] = {}
        self.processes = current()

    def process(self, turn: BlockTurn) -> None:
        """Quantize the layers of the block, in the order in which it calls them."""
        if self.smooth is not None:
            self.notes += smooth_block(turn, self.shared, self.smooth)
        prepared = self.quantizer.prepare_block(turn, self.shared)
        self.notes += prepared.notes
        mine = self._mine(turn)
        found: list[tuple[str, str]] = []
        for name in list(turn.statistics) or turn.layers:
            # The last layer that shares statistics frees them.
            stats = turn.statistics.pop(name, None)
            if name not in mine:
                continue
            self.quantize(name, stats, prepared.weights.get(name))
            if stats is not None:
                found += [(name, note) for note in stats.notes]
        self.notes += found if self.processes.count == 1 else self._exchange(mine, found)

    def _mine(self, turn: BlockTurn) -> set[str]:
        """The layers of the block that this process quantizes; of those that share a weight, the first. Layers with one
        input stay together: what a method derives from its statistics is worked out once."""
        groups: dict[int, list[str]] = {}
        for name in turn.layers:
            if name in self.sharing:
                groups.setdefault(id(turn.statistics.get(name, name)), []).append(name)
        by_first = {names[0]: names for names in groups.values()}
        sizes = {first: sum(turn.layers[name].weight.numel() for name in names) for first, names in by_first.items()}
        return {name for first in self.processes.divide(sizes) for name in by_first[first]}

    def _exchange(self, mine: set[str], notes: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Hand round what this process quantized, and take over the rest; returns the notes of all."""
        packed = {}
        for name in mine:
            weight = self.layers[name].weight
            assert isinstance(weight, CompressedWeight)
            parts = {part: tensor.cpu() for part, tensor in weight.components().items()}
            packed[name] = (weight.spec(), parts, self.done[name])
        gathered = self.processes.gather((packed, notes))
        for theirs, _ in gathered:
            for name, (spec, parts, record) in theirs.items():
                if name not in mine:
                    device = self.layers[name].weight.device
                    parts = {part: tensor.to(device) for part, tensor in parts.items()}
                    self._put(CompressedWeight.from_components(spec, parts), record)
        return [note for _, theirs in gathered for note in theirs]

    def summary(self, left_alone: list[tuple[str, str]], seconds: dict[str, float]) -> QuantizationSummary:
        """seconds: of the walk."""
        return QuantizationSummary(
            method=self.quantizer.method,
            settings=self.quantizer.model_dump(mode="json"),
            layers=tuple(self.done[name] for name in self.layers),
            left_alone=tuple(left_alone),
            notes=tuple(self.notes),
            seconds=self.seconds | seconds,
            plan=self._bits(),
        )

    def _bits(self) -> dict[str, int]:
        return {name: int(quantizer.model_dump()["bits"]) for name, quantizer in self.plan.items()}

    # What a walk out of core asks for.

    @property
    def needs(self) -> tuple[str, ...]:
        return with_smoothing(self.quantizer.needs, self.smooth is not None)

    @property
    def copies(self) -> tuple[float, bool]:
        return self.quantizer.block_copies, self.quantizer.keeps_activations

    @property
    def identity(self) -> dict[str, Any]:
        found = {"settings": self.quantizer.model_dump(mode="json")} | ({"plan": self._bits()} if self.plan else {})
        return found if self.smooth is None else found | {"smooth": self.smooth}

    def stored_bits(self, shape: tuple[int, int]) -> float:
        return self.quantizer.estimate_bits(shape)

    def quantize(self, name: str, stats: InputStatistics | None = None, ready: CompressedWeight | None = None) -> None:
        """Replace the weight of this layer, and of those that share it, if that is still to be done.

        ready: the quantized weight, where the method has it already.
        """
        if name in self.done:
            return
        begin = time.monotonic()
        dense = self.layers[name].weight.detach()
        quantizer = self.plan.get(name, self.quantizer)
        try:
            if ready is not None:
                quantized = ready
            elif name in self.pruned:
                quantized = quantizer.quantize_pruned(dense, kept_mask(dense), stats)
            else:
                quantized = quantizer.quantize(dense, stats)
        except ModelError as error:
            problems = [Problem(f"{name} ({item.where})", item.what, item.fix) for item in error.problems]
            raise ModelError(problems) from error
        change = quantized.dequantize(torch.float32).sub_(dense)
        relative_error, output_error = measure_change(change, dense, stats)
        record = QuantizedLayer(
            name=name,
            shape=(dense.shape[0], dense.shape[1]),
            relative_error=relative_error,
            output_error=output_error,
            bits_per_weight=quantized.bits_per_weight,
            storage_bytes=quantized.storage_bytes,
        )
        self._put(quantized, record)
        self.seconds["quantize"] = self.seconds.get("quantize", 0.0) + time.monotonic() - begin

    def _put(self, weight: CompressedWeight, record: QuantizedLayer) -> None:
        """In place of the dense one, at every layer that shares it."""
        parameter = nn.Parameter(weight, requires_grad=False)
        for same in self.sharing[record.name]:
            self.layers[same].weight = parameter
            self.done[same] = replace(record, name=same)


def select_layers(model: nn.Module, quantizer: Quantizer) -> tuple[list[tuple[str, nn.Linear]], list[tuple[str, str]]]:
    """The layers that the patterns select, and the others with the reason.

    Raises:
        ModelError: a pattern matches no linear layer inside the blocks, or nothing is left to quantize.
    """
    return selection.select_layers(model, quantizer.targets, quantizer.skip, "quantized")


def check_layers(layers: list[tuple[str, nn.Linear]], quantizer: Quantizer, values: bool = True) -> None:
    """Whether the quantizer can take all these layers. values: look at their weights too, not only at the shapes.

    Raises:
        ModelError: one problem for each reason, naming the layers that it holds for.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers:
        if reason := layer_problem(layer, quantizer, values):
            found.setdefault(reason, []).append(name)
    if found:
        raise ModelError([Problem(list_names(names), what, fix) for (what, fix), names in found.items()])


def layer_problem(layer: nn.Linear, quantizer: Quantizer, values: bool = True) -> tuple[str, str] | None:
    """Why the layer cannot be quantized, and what to do; None if it can."""
    weight = layer.weight
    if isinstance(weight, CompressedWeight):
        return "compressed already", "quantize the original model"
    if values and weight.device.type == "meta":
        return "no data (on the meta device)", "load the model first"
    if reason := quantizer.check((weight.shape[0], weight.shape[1])):
        return reason, "change the settings or add the layers to skip"
    if values and not all_finite(weight.detach()):
        return "NaN or infinite weights", "the model file is damaged: get it again"
    return None


def shared_parameters(model: nn.Module) -> set[str]:
    """Full names of the parameters that stand at more than one place of the model."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


def list_names(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many there are."""
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more ({len(names)} layers)"

"""A quantizer applied to a model, layer by layer."""

from __future__ import annotations

import fnmatch
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress_peft.errors import ConfigError, ModelError, Problem
from compress_peft.models.hf_quantizer import attach
from compress_peft.models.layers import linear_layers
from compress_peft.models.walk import BlockWalk, InputStatistics
from compress_peft.quantization.base import Quantizer
from compress_peft.tensors.sweep import weighted_error
from compress_peft.weights import CompressedWeight


@dataclass(frozen=True)
class QuantizedLayer:
    name: str
    shape: tuple[int, int]
    """(out, in)"""
    bits_per_weight: float
    storage_bytes: int
    relative_error: float
    """Frobenius norm of (dense - dequantized) over that of dense."""
    output_error: float | None = None
    """With calibration: norm of the change of the layer's outputs over that of its outputs, all calibration tokens."""


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
    model: nn.Module, quantizer: Quantizer, calibration: Tensor | None = None, progress: bool = True
) -> QuantizationSummary:
    """Replace the weights of the selected linear layers in place; each dense weight is freed as its turn passes.

    Layers that share one weight share the quantized one (with statistics: those of the first of them).
    calibration: (samples, length) int64 token ids, all of them real tokens; for quantizers that need statistics.

    Raises:
        ConfigError: the quantizer needs calibration and gets none.
        DataError: the calibration does not fit the model.
        ModelError: a pattern matches no layer, or layers cannot be quantized (all are named); nothing was changed.
            Or the values of a weight do not fit the grid's dtype, or calibration shows NaN inside the model: layers
            before that are quantized already.
    """
    if quantizer.needs and calibration is None:
        fix = "give quantize_model(..., calibration=token ids), or use a method without calibration"
        raise ConfigError(Problem(quantizer.method, "needs calibration text and got none", fix))
    chosen, left_alone = select_layers(model, quantizer)
    _check(chosen, quantizer)
    work = _Replacement(quantizer, chosen)
    if quantizer.needs:
        assert calibration is not None
        _walk(model, work, calibration, progress)
    else:
        for name, _ in tqdm(chosen, desc=f"quantizing ({quantizer.method})", unit="layer", disable=not progress):
            work.quantize(name)
    attach(model)
    return QuantizationSummary(
        method=quantizer.method,
        settings=quantizer.model_dump(mode="json"),
        layers=tuple(work.done[name] for name, _ in chosen),
        left_alone=tuple(left_alone),
        notes=tuple(work.notes),
        seconds=work.seconds,
    )


class _Replacement:
    """The layers that are to be quantized, by name, and what was done with them."""

    def __init__(self, quantizer: Quantizer, layers: list[tuple[str, nn.Linear]]):
        self.quantizer = quantizer
        self.layers = dict(layers)
        self.sharing: dict[int, list[str]] = {}
        for name, layer in layers:
            self.sharing.setdefault(id(layer.weight), []).append(name)
        self.done: dict[str, QuantizedLayer] = {}
        self.notes: list[tuple[str, str]] = []
        self.seconds: dict[str, float] = {}

    def quantize(self, name: str, stats: InputStatistics | None = None) -> None:
        """Replace the weight of this layer, and of those that share it, if that is still to be done."""
        if name in self.done:
            return
        begin = time.monotonic()
        dense = self.layers[name].weight.detach()
        try:
            quantized = self.quantizer.quantize(dense, stats)
        except ModelError as error:
            problems = [Problem(f"{name} ({item.where})", item.what, item.fix) for item in error.problems]
            raise ModelError(problems) from error
        change = quantized.dequantize(torch.float32).sub_(dense)
        output_error = None
        if stats is not None and stats.tokens:
            before = weighted_error(dense.float(), stats.hessian)
            output_error = math.sqrt(weighted_error(change, stats.hessian) / before) if before > 0 else 0.0
        parameter = nn.Parameter(quantized, requires_grad=False)
        for same in self.sharing.pop(id(self.layers[name].weight)):
            self.layers[same].weight = parameter
            self.done[same] = QuantizedLayer(
                name=same,
                shape=(dense.shape[0], dense.shape[1]),
                bits_per_weight=quantized.bits_per_weight,
                storage_bytes=quantized.storage_bytes,
                relative_error=_relative(change, dense),
                output_error=output_error,
            )
        self.seconds["quantize"] = self.seconds.get("quantize", 0.0) + time.monotonic() - begin


def _walk(model: nn.Module, work: _Replacement, calibration: Tensor, progress: bool) -> None:
    """Block by block: the statistics, the layers, and on with the outputs of the quantized block."""
    walk = BlockWalk(model, calibration, work.layers, progress)
    for statistics in walk:
        for name in list(statistics):
            # The last layer that shares them frees them.
            stats = statistics.pop(name)
            work.quantize(name, stats)
            work.notes += [(name, note) for note in stats.notes]
    work.seconds |= walk.seconds


def select_layers(model: nn.Module, quantizer: Quantizer) -> tuple[list[tuple[str, nn.Linear]], list[tuple[str, str]]]:
    """The layers that the patterns select, and the others with the reason.

    Raises:
        ModelError: a pattern matches no linear layer inside the blocks, or nothing is left to quantize.
    """
    inside = linear_layers(model)
    names = [name for name, _ in inside]
    everything = [name for name, _ in linear_layers(model, inside_blocks=False)]
    problems = []
    for setting in ("targets", "skip"):
        for pattern in getattr(quantizer, setting):
            if fnmatch.filter(names, pattern):
                continue
            what = f'the pattern "{pattern}" matches no linear layer inside the decoder blocks'
            if fnmatch.filter(everything, pattern):
                what += "; layers outside of them (the head) are never quantized"
            problems.append(Problem(setting, what, f'layers are named like "{names[0]}"' if names else ""))
    if problems:
        raise ModelError(problems)
    chosen = [(name, layer) for name, layer in inside if quantizer.selects(name)]
    left_alone = []
    for name in everything:
        if name not in names:
            left_alone.append((name, "outside the decoder blocks"))
        elif (pattern := quantizer.skipped_by(name)) is not None:
            left_alone.append((name, f'skip: "{pattern}"'))
        elif not quantizer.selects(name):
            left_alone.append((name, "matches no pattern of targets"))
    if not chosen:
        raise ModelError(Problem("skip", "the patterns leave no layer to quantize", "remove a pattern"))
    return chosen, left_alone


def _check(layers: list[tuple[str, nn.Linear]], quantizer: Quantizer) -> None:
    problems = []
    for name, layer in layers:
        weight = layer.weight
        if isinstance(weight, CompressedWeight):
            problems.append(Problem(name, "is compressed already", "quantize the original model"))
        elif weight.device.type == "meta":
            problems.append(Problem(name, "has no data (it is on the meta device)", "load the model first"))
        elif reason := quantizer.check((weight.shape[0], weight.shape[1])):
            problems.append(Problem(name, reason, "change the settings or add the layer to skip"))
        elif not torch.isfinite(weight.detach()).all():
            problems.append(Problem(name, "has NaN or infinite weights", "the model file is damaged: get it again"))
    if problems:
        raise ModelError(problems)


def _relative(error: Tensor, dense: Tensor) -> float:
    norm = torch.linalg.vector_norm(dense, dtype=torch.float32)
    return float(torch.linalg.vector_norm(error) / norm) if norm > 0 else 0.0

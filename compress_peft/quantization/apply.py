"""A quantizer applied to a model, layer by layer."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress_peft.errors import ModelError, Problem
from compress_peft.models.hf_quantizer import attach
from compress_peft.models.layers import linear_layers
from compress_peft.quantization.base import Quantizer
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


@dataclass(frozen=True)
class QuantizationSummary:
    """What was done, for the report."""

    method: str
    settings: dict
    layers: tuple[QuantizedLayer, ...]
    left_alone: tuple[tuple[str, str], ...]
    """(layer, reason) of every linear layer that stayed dense."""

    @property
    def bits_per_weight(self) -> float:
        """Over all quantized layers, all storage counted."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 8 * sum(layer.storage_bytes for layer in self.layers) / weights

    @property
    def relative_error(self) -> float:
        """Mean over the layers."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)


def quantize_model(model: nn.Module, quantizer: Quantizer, progress: bool = True) -> QuantizationSummary:
    """Replace the weights of the selected linear layers in place; each dense weight is freed as its turn passes.

    Layers that share one weight share the quantized one.

    Raises:
        ModelError: a pattern matches no layer, or layers cannot be quantized (all are named); nothing was changed.
    """
    chosen, left_alone = select_layers(model, quantizer)
    _check(chosen, quantizer)
    done: dict[int, tuple[Tensor, nn.Parameter, float]] = {}
    uses: dict[int, int] = {}
    for _, layer in chosen:
        uses[id(layer.weight)] = uses.get(id(layer.weight), 0) + 1
    results = []
    for name, layer in tqdm(chosen, desc=f"quantizing ({quantizer.method})", unit="layer", disable=not progress):
        dense = layer.weight
        key = id(dense)
        if key not in done:
            quantized = quantizer.quantize(dense.detach())
            error = _relative_error(dense.detach(), quantized)
            # The dense weight is kept (its id with it) only while other layers still share it.
            done[key] = (dense, nn.Parameter(quantized, requires_grad=False), error)
        _, parameter, error = done[key]
        layer.weight = parameter
        uses[key] -= 1
        if not uses[key]:
            del done[key]
        del dense
        weight = parameter
        assert isinstance(weight, CompressedWeight)
        shape = (weight.shape[0], weight.shape[1])
        results.append(QuantizedLayer(name, shape, weight.bits_per_weight, weight.storage_bytes, error))
    attach(model)
    settings = quantizer.model_dump(mode="json")
    return QuantizationSummary(quantizer.method, settings, tuple(results), tuple(left_alone))


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


def _relative_error(dense: Tensor, quantized: CompressedWeight) -> float:
    norm = torch.linalg.vector_norm(dense, dtype=torch.float32)
    error = quantized.dequantize(torch.float32).sub_(dense)
    return float(torch.linalg.vector_norm(error) / norm) if norm > 0 else 0.0

"""Bytes of a model's tensors, by what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compress_peft.models.bundle import bare_backbone
from compress_peft.models.sparsity import sparsity
from compress_peft.weights.compressed import CompressedWeight
from eval.costs import Storage
from eval.forward import transformers_model


def measure_storage(model: nn.Module, folder: str | Path | None = None) -> Storage:
    """Counts every parameter and buffer once, also where several modules share it.

    folder: where the stage is saved, for `disk_bytes`.
    """
    owners = _owners(model)
    backbone = _backbone_tensors(model)
    totals = dict.fromkeys(("codes", "scales", "dense_linear", "embeddings", "adapter", "other"), 0)
    parameters = adapter_parameters = layers = 0
    quantized_bytes = quantized_weights = 0
    seen: set[Any] = set()
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        key = _identity(tensor)
        if key in seen:
            continue
        seen.add(key)
        kind = _kind(name, owners, model) if backbone is None or key in backbone else "adapter"
        if isinstance(tensor, CompressedWeight):
            for part, component in tensor.components().items():
                totals["codes" if part == tensor.component_names[0] else "scales"] += _bytes(component)
            layers += 1
            parameters += tensor.numel()
            quantized_weights += tensor.numel()
            quantized_bytes += tensor.storage_bytes
            continue
        totals[kind] += _bytes(tensor)
        if isinstance(tensor, nn.Parameter):
            if kind == "adapter":
                adapter_parameters += tensor.numel()
            else:
                parameters += tensor.numel()
    return Storage(
        **totals,
        parameters=parameters,
        adapter_parameters=adapter_parameters,
        quantized_layers=layers,
        bits_per_weight=8 * quantized_bytes / quantized_weights if quantized_weights else None,
        sparsity=sparsity(model),
        disk_bytes=folder_bytes(folder) if folder is not None else None,
    )


def folder_bytes(folder: str | Path) -> int:
    """Sum of the sizes of all files below a folder, or of one file."""
    path = Path(folder)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Tied tensors have one address; an empty tensor has none, so it gets its own."""
    if isinstance(tensor, CompressedWeight):
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr() or id(tensor), tensor.numel())


def _backbone_tensors(model: nn.Module) -> set[Any] | None:
    """What an adapted model has from its backbone; all else is the adapter's, of whatever kind. None without one."""
    if not isinstance(model, PeftModel):
        return None
    with bare_backbone(model) as backbone:
        return {_identity(tensor) for tensor in (*backbone.parameters(), *backbone.buffers())}


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _kind(name: str, owners: dict[str, nn.Module], model: nn.Module) -> str:
    owner = owners[name.rpartition(".")[0]]
    causal_lm = transformers_model(model)
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    plain = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    if isinstance(owner, nn.Embedding) or owner in plain:
        return "embeddings"
    return "dense_linear" if isinstance(owner, nn.Linear) else "other"

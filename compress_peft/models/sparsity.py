"""The fact that a model was pruned: which layers, and which of their weights are zero for good.

config.json of a pruned model carries `pruning`: {"pattern": "unstructured" or "2:4" or ..., "layers": [names]}, so that
it is known after loading too. The mask itself is not stored: it is the pattern of the weights that are not zero. A
pruned weight is an exact zero in every representation (dense, affine and NF4 grids all hold zero), and a kept weight
that happens to be, or is rounded to, zero counts as pruned from there on, which breaks no n:m pattern and loses nothing
that a later step could not do without.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.bundle import bare_backbone
from compress_peft.weights import CompressedWeight

UNSTRUCTURED = "unstructured"
"""The pattern of a model whose zeros may stand anywhere."""


def record_pruning(model: nn.Module, pattern: str, layers: Iterable[str]) -> None:
    """Say in the model's configuration that these layers (full names) are pruned; `save_pretrained` writes it.

    Models without a configuration are left alone.
    """
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.pruning = {"pattern": pattern, "layers": list(layers)}


def forget_pruning(model: nn.Module) -> None:
    """Take back `record_pruning`, of a model whose zeros were given up."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "pruning"):
        del config.pruning


def pruning_pattern(model: nn.Module) -> str | None:
    """ "unstructured", "2:4", ...; None for a model that was not pruned."""
    facts = _facts(model)
    return None if facts is None else str(facts["pattern"])


def pruned_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The pruned linear layers by their full names in the plain model, also where adapters are attached.

    Raises:
        ModelError: the configuration names layers that the model does not have.
    """
    facts = _facts(model)
    if facts is None:
        return {}
    with bare_backbone(model) if isinstance(model, PeftModel) else nullcontext(model) as bare:
        modules = dict(bare.named_modules())  # some adapters wrap whole blocks, which changes the names inside
    found, problems = {}, []
    for name in facts["layers"]:
        layer = modules.get(name)
        if isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        if isinstance(layer, nn.Linear):
            found[name] = layer
        else:
            what = "is pruned according to config.json, and the model has no such linear layer"
            problems.append(Problem(name, what, "get the folder again, or remove it from pruning.layers"))
    if problems:
        raise ModelError(problems)
    return found


def layer_masks(model: nn.Module) -> dict[str, Tensor]:
    """Layer -> bool (out, in), True = kept; empty for a model that was not pruned. One byte a weight, all at once.

    Raises:
        ModelError: the configuration names layers that the model does not have.
    """
    return {name: kept_mask(layer.weight) for name, layer in pruned_layers(model).items()}


def sparsity(model: nn.Module) -> float | None:
    """The share of zeros among the weights of the pruned layers; None for a model that was not pruned.

    Raises:
        ModelError: the configuration names layers that the model does not have.
    """
    layers = pruned_layers(model).values()
    weights = sum(layer.weight.numel() for layer in layers)
    return 1 - sum(int(kept_mask(layer.weight).sum()) for layer in layers) / weights if weights else None


@torch.no_grad()
def kept_mask(weight: Tensor) -> Tensor:
    """bool (out, in): where a dense or compressed weight is not zero."""
    return (weight.dequantize(torch.float32) if isinstance(weight, CompressedWeight) else weight) != 0


def _facts(model: nn.Module) -> dict[str, Any] | None:
    return getattr(getattr(_plain(model), "config", None), "pruning", None)


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model

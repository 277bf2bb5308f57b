"""What is known of a pruned model: kept over saving, quantizing and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from compress_peft.errors import ModelError
from compress_peft.loading import load
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.models.sparsity import (
    forget_pruning,
    layer_masks,
    pruned_layers,
    pruning_pattern,
    record_pruning,
    sparsity,
)
from compress_peft.quantization import QUANTIZERS, quantize_model
from tests.conftest import build_tiny_llama

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def pruned_llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = build_tiny_llama(vocab_size=320)
    kept = {}
    for name in (Q, DOWN):
        weight = model.get_submodule(name).weight
        kept[name] = torch.rand(weight.shape) < 0.5
        weight.data *= kept[name]
    model.get_submodule(Q).weight.data[:, 32:] = 0  # whole groups of zeros
    kept[Q][:, 32:] = False
    record_pruning(model, "unstructured", kept)
    return model, kept


def same(found: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(kept) and all(torch.equal(found[name], kept[name]) for name in kept)


def test_dense_saved_and_adapted(tmp_path: Path) -> None:
    assert layer_masks(build_tiny_llama()) == {} and pruning_pattern(build_tiny_llama()) is None
    model, kept = pruned_llama()
    assert same(layer_masks(model), kept)
    weights = sum(mask.numel() for mask in kept.values())
    assert sparsity(model) == 1 - sum(int(mask.sum()) for mask in kept.values()) / weights
    save_model(model, tmp_path / "model", byte_tokenizer())
    again, _ = load(tmp_path / "model")
    assert same(layer_masks(again), kept) and pruning_pattern(again) == "unstructured"
    forget_pruning(model)
    forget_pruning(model)
    assert layer_masks(model) == {} and sparsity(model) is None
    adapted = get_peft_model(again, LoraConfig(target_modules=["q_proj"]))
    assert same(layer_masks(adapted), kept) and pruning_pattern(adapted) == "unstructured"


@pytest.mark.parametrize("method", ["nf4", "nf4 single", "rtn", "rtn symmetric"])
def test_quantized_layers_keep_their_zeros(method: str, tmp_path: Path) -> None:
    model, kept = pruned_llama()
    settings = {
        "nf4": {"method": "nf4", "double_quant": True},
        "nf4 single": {"method": "nf4", "double_quant": False},
        "rtn": {"method": "rtn", "bits": 8, "group_size": 32},
        "rtn symmetric": {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True},
    }[method]
    quantize_model(model, QUANTIZERS.create(settings.pop("method"), **settings), progress=False)
    save_model(model, tmp_path / "model", byte_tokenizer())
    again, _ = load(tmp_path / "model")
    for name, mask in layer_masks(again).items():
        assert not mask[~kept[name]].any()  # a pruned weight is zero
        assert mask[kept[name]].float().mean() > 0.8  # few others are


def test_layers_that_are_not_there() -> None:
    model, _ = pruned_llama()
    record_pruning(model, "2:4", ["model.layers.0.mlp.no_proj", "model.norm", Q])
    with pytest.raises(ModelError, match=r"(?s)2 problems.*no_proj.*model\.norm"):
        pruned_layers(model)

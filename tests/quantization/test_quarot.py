"""Rotations change nothing but how well the weights can be rounded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from compress_peft.errors import ModelError
from compress_peft.models.save import save_model
from compress_peft.pruning import PRUNERS, prune_model
from compress_peft.quantization import quantize_model
from compress_peft.quantization.quarot import hadamard_matrix, rotate_model, rotation
from compress_peft.quantization.rtn import RTN
from pipelines.plan import ModelShape
from pipelines.run import main
from pipelines.steps.prune import Prune
from pipelines.steps.quantize import Quantize
from tests.conftest import build_tiny_llama

IDS = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
SMALL = {
    "hidden_size": 72, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 12,
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.1,
}  # fmt: skip


def build(model_type: str, **more: Any) -> Any:
    """float64, with norms that are not ones and biases that are not zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | more)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.4)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "Gemma" not in type(module).__name__:
            module.forward = partial(exact_norm, module)  # transformers' own rounds to float32
    return model


def exact_norm(module: Any, x: Tensor) -> Tensor:
    return module.weight * (x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 48, 64, 128, 576, 896])
def test_hadamard_matrices(size: int) -> None:
    matrix = hadamard_matrix(size)
    assert matrix is not None and matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 7, 18, 50, 576])
def test_rotations_are_orthogonal(size: int) -> None:
    matrix, kind = rotation(size, torch.Generator().manual_seed(0))
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() < 1e-13
    assert ("Hadamard" in kind) == (size == 576)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 10}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),  # heads wider than hidden / heads
    ],
)
def test_the_rotated_model_is_the_same_function(model_type: str, more: dict[str, Any]) -> None:
    model = build(model_type, **more)
    want, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    notes = rotate_model(model)
    assert (logits(model) - want).abs().max() <= 1e-10
    changed = {name for name, value in model.state_dict().items() if (value - before[name]).abs().max() > 1e-3}
    untouched = {name.rpartition(".")[0].rpartition(".")[2] for name in before.keys() - changed}
    assert untouched <= {"q_norm", "k_norm", "q_proj", "k_proj", "gate_proj", "up_proj"}  # the latter: biases
    assert {name for name in before if name.endswith("proj.weight")} <= changed
    assert any("tied no more" in note for note in notes) == ("tie_word_embeddings" in more)


def test_a_rotated_model_with_a_head_of_its_own_comes_back_from_disk(tmp_path: Path) -> None:
    model = build_tiny_llama(tie_word_embeddings=True)
    before = logits(model)
    rotate_model(model)
    want = logits(model)
    assert (want - before).abs().max() <= 1e-4 * before.abs().max()
    again = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path / "model"))
    assert torch.equal(logits(again), want)
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


def test_outliers_are_spread_so_that_rounding_costs_less() -> None:
    errors = []
    for rotated in (False, True):
        model = build_tiny_llama()
        with torch.no_grad():
            for block in model.model.layers:  # a channel of the residual stream with large weights
                for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.mlp.gate_proj, block.mlp.up_proj):
                    layer.weight[:, 5] *= 12
        want = logits(model)
        if rotated:
            rotate_model(model)
        quantize_model(model, RTN(bits=3, group_size=32), None, progress=False)
        errors.append(float((logits(model) - want).norm() / want.norm()))
    assert errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gpt_neox", "opt"])
def test_other_models_are_refused_and_stay_as_they_are(model_type: str) -> None:
    more = {"word_embed_proj_dim": 72, "ffn_dim": 80} if model_type == "opt" else {}
    model = build(model_type, **more)
    before = logits(model)
    with pytest.raises(ModelError, match="leave rotate out"):
        rotate_model(model)
    assert torch.equal(logits(model), before)


def test_pruned_and_compressed_models_are_refused() -> None:
    pruned, compressed = build_tiny_llama(), build_tiny_llama()
    prune_model(pruned, PRUNERS.create("magnitude", pattern="2:4"), progress=False)
    quantize_model(compressed, RTN(group_size=32), None, progress=False)
    with pytest.raises(ModelError, match="would fill the zeros"):
        rotate_model(pruned)
    with pytest.raises(ModelError, match="compressed already"):
        rotate_model(compressed)


def test_as_a_setting_of_the_quantize_step(tmp_path: Path) -> None:
    recipe = yaml.safe_load(Path("configs/smoke/awq.yaml").read_text())
    recipe["model"]["config"]["tie_word_embeddings"] = True
    step = {"step": "quantize", "method": "rtn", "group_size": 32, "rotate": True}
    recipe["steps"], recipe["evaluate"] = [step], {"perplexity": None, "profile": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    notes = json.dumps(report)
    assert "rotated by a randomized Hadamard matrix" in notes and "the head is tied no more" in notes
    folder = next((tmp_path / "out").rglob("model/config.json")).parent
    stored = sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / "model.safetensors").values())
    shape = ModelShape(build_tiny_llama(**recipe["model"]["config"] | {"model_type": "llama"}), torch.float32, 64)
    planned = Quantize.model_validate(step)
    assert planned.check(shape, "steps[0]") == []
    assert planned.estimate(shape).disk == stored
    with pytest.raises(ValidationError, match="rotate needs the whole model"):
        Quantize.model_validate(step | {"out_of_core": True})
    earlier = [Prune.model_validate({"step": "prune", "method": "magnitude"})]
    assert "fill the zeros" in planned.check_against(earlier, "steps[1]")[0].what

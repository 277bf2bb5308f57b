"""AWQ: groupings found in every architecture, scaling that changes nothing, scales and thresholds that help."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress_peft.errors import ConfigError
from compress_peft.models.layers import linear_layers
from compress_peft.models.sparsity import record_pruning
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.quantization.apply import Replacement, shared_parameters
from compress_peft.quantization.groupings import find_groupings
from compress_peft.tensors.sweep import weighted_error
from tests.conftest import build_tiny_llama

CALIBRATION = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))

LLAMA = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "v_proj": ("o_proj",),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "up_proj": ("down_proj",),
}
GQA = {"intermediate_size": 64, "num_key_value_heads": 2}
FUSED = {"input_layernorm": ("query_key_value",), "post_attention_layernorm": ("dense_h_to_4h",)}
ARCHITECTURES: list[tuple[str, dict[str, Any], dict[str, tuple[str, ...]], set[str]]] = [
    ("llama", GQA, LLAMA, set()),
    ("mistral", GQA, LLAMA, set()),
    ("qwen2", GQA, LLAMA, set()),
    ("qwen3", GQA | {"head_dim": 8}, LLAMA, set()),
    ("gemma", GQA | {"head_dim": 8, "num_key_value_heads": 1}, LLAMA, set()),
    (
        "gemma2",
        GQA | {"head_dim": 8},
        {{"post_attention_layernorm": "pre_feedforward_layernorm"}.get(k, k): v for k, v in LLAMA.items()},
        set(),
    ),
    (
        "phi",
        {"intermediate_size": 64},
        {"input_layernorm": ("q_proj", "k_proj", "v_proj", "fc1"), "v_proj": ("dense",)},
        {"fc2"},
    ),
    (
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 32},
        {
            "self_attn_layer_norm": ("q_proj", "k_proj", "v_proj"),
            "v_proj": ("out_proj",),
            "final_layer_norm": ("fc1",),
            "fc1": ("fc2",),
        },
        set(),
    ),
    ("gpt_neox", {"intermediate_size": 64}, FUSED, {"dense", "dense_4h_to_h"}),
    ("bloom", {"n_head": 4, "n_layer": 2}, FUSED, {"dense", "dense_4h_to_h"}),
    (  # its norms' outputs are its residuals too
        "bloom",
        {"n_head": 4, "n_layer": 2, "apply_residual_connection_post_layernorm": True},
        {},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
]


def build(kind: str, settings: dict[str, Any]) -> nn.Module:
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common | special | settings)).eval()
    for parameter in model.parameters():  # norms and biases as in a trained model, weights of a useful size
        parameter.data = parameter.data * 3 if parameter.dim() > 1 else parameter + 0.1 * torch.randn(len(parameter))
    return model


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize(("kind", "settings", "want", "left"), ARCHITECTURES)
def test_scaling_changes_nothing(
    kind: str, settings: Any, want: dict[str, tuple[str, ...]], left: set[str], monkeypatch: Any
) -> None:
    """The groupings of each architecture; and the whole model gives the same logits in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # Gemma's norms leave float64 otherwise
    model = build(kind, settings).double()
    with torch.no_grad():
        before = model(CALIBRATION).logits
    weights = {name: layer.weight.clone() for name, layer in linear_layers(model)}
    generator = torch.Generator().manual_seed(1)
    for turn in BlockWalk(model, CALIBRATION, dict(linear_layers(model)), progress=False):
        found, reasons = find_groupings(turn, shared_parameters(model))
        assert {last(g.source): tuple(map(last, g.targets)) for g in found} == want
        assert {last(name) for name in reasons} == left
        for grouping in found:
            grouping.apply(torch.rand(int(grouping.index.max()) + 1, generator=generator) * 3 + 0.3)
    with torch.no_grad():
        assert (model(CALIBRATION).logits - before).abs().max() <= 1e-10 * before.abs().max()
    for name, layer in linear_layers(model):
        assert torch.equal(layer.weight, weights[name]) == (
            last(name) in left and not any(last(name) in t for t in want.values())
        )


def turns(model: nn.Module) -> list[BlockTurn]:
    return list(BlockWalk(model, CALIBRATION, dict(linear_layers(model)), progress=False))


def test_the_search_leaves_the_parameters_alone(tiny_llama) -> None:
    held = {name: (parameter, parameter.clone()) for name, parameter in tiny_llama.named_parameters()}
    for turn in turns(tiny_llama):
        find_groupings(turn, ())
    for name, parameter in tiny_llama.named_parameters():
        assert parameter is held[name][0] and torch.equal(parameter, held[name][1])


def test_a_block_is_tried_as_the_one_before(tiny_llama) -> None:
    """One pass to see what feeds what, one for all groupings; and what does not hold is looked for as in the first."""
    passes = [0, 0]
    for number, turn in enumerate(BlockWalk(tiny_llama, CALIBRATION, dict(linear_layers(tiny_llama)), progress=False)):

        def run(chunk: Tensor, number: int = number, run: Any = turn.run) -> Tensor:
            passes[number] += 1
            return run(chunk)

        turn.run = run
        found = find_groupings(turn, ())[0]
    assert passes[0] > 4 and passes[1] == 2
    turn.memory["groupings"] = [dataclasses.replace(g.within(turn.name), index=g.index.flip(0)) for g in found]
    again = find_groupings(turn, ())[0]
    assert passes[1] > 6
    assert [(g.source, g.index.tolist()) for g in again] == [(g.source, g.index.tolist()) for g in found]


def test_what_is_known_does_not_outlive_a_kill(tiny_llama) -> None:
    """Where a head's value is always zero, a search cannot tell which output feeds which input: nor may the block
    before, since a walk that goes on there has none."""
    second = tiny_llama.model.layers[1]
    second.self_attn.v_proj.weight.data[5] = 0
    for turn in BlockWalk(tiny_llama, CALIBRATION, dict(linear_layers(tiny_llama)), progress=False):
        known = [g.source for g in find_groupings(turn, ())[0]]
    turn.memory.clear()
    assert known == [g.source for g in find_groupings(turn, ())[0]]
    assert not any("v_proj" in source for source in known) and any("up_proj" in source for source in known)


def test_shared_weights_are_not_touched(tiny_llama) -> None:
    first, second = tiny_llama.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.input_layernorm.weight = first.input_layernorm.weight
    shared = shared_parameters(tiny_llama)
    assert {last(name.removesuffix(".weight")) for name in shared} == {"up_proj", "input_layernorm"}
    for turn in turns(tiny_llama):
        found, reasons = find_groupings(turn, shared)
        assert [last(grouping.source) for grouping in found] == ["v_proj"]
        assert "shared with another place" in reasons[f"{turn.name}.mlp.gate_proj"] and len(reasons) == 6
    norm, weight = first.input_layernorm.weight, first.mlp.up_proj.weight
    summary = quantize_model(tiny_llama, QUANTIZERS.create("awq"), CALIBRATION, progress=False)
    assert first.input_layernorm.weight is second.input_layernorm.weight is norm
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight is not weight
    assert sum("not scaled" in note for _, note in summary.notes) == 12


def test_a_tied_head_stays_as_it_is() -> None:
    model = build_tiny_llama(tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    quantize_model(model, QUANTIZERS.create("awq"), CALIBRATION, progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, before)


def test_the_statistics_follow(tiny_llama) -> None:
    """What the method leaves of the statistics are those of the block as it left it."""
    for block in tiny_llama.model.layers:
        block.input_layernorm.weight.data = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(4)))
    turn = next(iter(BlockWalk(tiny_llama, CALIBRATION, dict(linear_layers(tiny_llama)), progress=False)))
    norm, before = turn.block.input_layernorm, turn.block.input_layernorm.weight
    QUANTIZERS.create("awq", bits=3, group_size=32).prepare_block(turn, ())
    assert (norm.weight / before - 1).abs().max() > 0.05
    again = next(iter(BlockWalk(tiny_llama, CALIBRATION, dict(linear_layers(tiny_llama)), progress=False)))
    for name, stats in again.statistics.items():
        for key in ("hessian", "square_sum", "sum"):
            found, want = getattr(turn.statistics[name], key), getattr(stats, key)
            assert torch.allclose(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())), (name, key)


def test_scales_are_the_best_of_the_grid(tiny_llama) -> None:
    """Against the formula on the inputs themselves, for v_proj -> o_proj with grouped-query attention."""
    quantizer = QUANTIZERS.create("awq", bits=3, group_size=32)
    turn = next(iter(BlockWalk(tiny_llama, CALIBRATION, dict(linear_layers(tiny_llama)), progress=False)))
    (grouping,) = [g for g in find_groupings(turn, ())[0] if last(g.source) == "v_proj"]
    heads = torch.arange(64).view(4, 16)
    assert torch.equal(grouping.index.view(4, 16), heads[[0, 0, 1, 1]])
    layer = turn.block.self_attn.o_proj
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        turn.run(turn.inputs[0])
    handle.remove()
    magnitude = torch.stack([seen[0][:, grouping.index == i].square().sum(1).mean().sqrt() for i in range(32)])
    rtn = QUANTIZERS.create("rtn", bits=3, group_size=32)
    losses, tried = [], []
    for step in range(20):
        scales = (magnitude / (magnitude.max() * magnitude.min()).sqrt()) ** (step / 19)
        columns = scales[grouping.index]
        rounded = rtn.quantize(layer.weight.detach() * columns).dequantize()
        losses.append(float(((seen[0] / columns) @ rounded.T - seen[0] @ layer.weight.detach().T).norm()))
        tried.append(scales)
    found = quantizer.search_scales(grouping, turn, turn.statistics["model.layers.0.self_attn.o_proj"])
    assert torch.allclose(found, tried[losses.index(min(losses))], rtol=1e-3)
    assert losses.index(min(losses)) > 0


def test_thresholds_are_the_best_of_those_tried() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 64, generator=generator) * 0.1
    weight[:, 9] *= 5
    given = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    found = QUANTIZERS.create("awq", bits=3, group_size=32).clip_groups(weight, given.T @ given)
    rtn = QUANTIZERS.create("rtn", bits=3, group_size=32)
    changed = 0
    for row in range(5):
        for start in (0, 32):
            part, seen = weight[row : row + 1, start : start + 32], given[:, start : start + 32]
            limits = [float(part.abs().max()) * (1 - step / 20) for step in range(10)]
            cuts = [part.clamp(-limit, limit) for limit in limits]
            errors = [float((seen @ (rtn.quantize(cut).dequantize() - part).T).norm()) for cut in cuts]
            best = errors.index(min(errors))
            changed += best > 0
            assert torch.allclose(found[row, start : start + 32], cuts[best][0])
    assert changed


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 3, "symmetric": True}])
def test_less_error_than_rounding(settings: dict[str, Any]) -> None:
    """Layer by layer on the same inputs, with activations of different sizes, as language models have them."""
    model = build_tiny_llama()
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(4)))
    wins, total = 0, 0
    rtn = QUANTIZERS.create("rtn", **settings, group_size=32)
    for turn in BlockWalk(model, CALIBRATION, dict(linear_layers(model)), progress=False):
        dense = {name: layer.weight.detach().clone() for name, layer in turn.layers.items()}
        plain = {
            name: (
                weighted_error(rtn.quantize(weight).dequantize() - weight, turn.statistics[name].hessian)
                / weighted_error(weight, turn.statistics[name].hessian)
            )
            ** 0.5
            for name, weight in dense.items()
        }
        work = Replacement(QUANTIZERS.create("awq", **settings, group_size=32), list(turn.layers.items()))
        work.process(turn)
        wins += sum(work.done[name].output_error <= error for name, error in plain.items())
        total += len(plain)
    assert total == 14 and wins >= 0.9 * total, wins


def test_pruned_weights_stay_zero(tiny_llama) -> None:
    """Scaling and clipping keep zeros, and the grids hold zero."""
    masks = {}
    for name, layer in linear_layers(tiny_llama):
        masks[name] = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(len(name))) < 0.5
        layer.weight.data *= masks[name]
    record_pruning(tiny_llama, "unstructured", list(masks))
    quantize_model(tiny_llama, QUANTIZERS.create("awq"), CALIBRATION, progress=False)
    for name, layer in linear_layers(tiny_llama):
        assert not layer.weight.dequantize()[~masks[name]].any(), name


@pytest.mark.parametrize("method", ["hqq", "autoround"])
def test_methods_that_move_zeros_are_refused_after_pruning(tiny_llama, method: str) -> None:
    record_pruning(tiny_llama, "unstructured", ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ConfigError, match="pruned"):
        quantize_model(tiny_llama, QUANTIZERS.create(method), CALIBRATION, progress=False)

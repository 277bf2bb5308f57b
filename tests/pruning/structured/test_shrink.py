"""Structured pruners: formulas, sizes, dead parts, and models that plain transformers loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from compress_peft.errors import ModelError
from compress_peft.models.save import save_model
from compress_peft.models.statistics import InputStatistics
from compress_peft.pruning.structured import SHRINKERS, ShrinkSummary, shrink_model
from compress_peft.pruning.structured.anatomy import anatomy
from compress_peft.pruning.structured.flap import fluctuation
from compress_peft.pruning.structured.plan import ranges
from compress_peft.pruning.structured.shortgpt import block_influence
from compress_peft.quantization import QUANTIZERS
from compress_peft.quantization.apply import quantize_model
from tests.conftest import build_tiny_llama

TEXT = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
WIDTH = ("llm_pruner", "flap", "minitron")


def shrunk(model: PreTrainedModel, method: str, **settings: Any) -> ShrinkSummary:
    return shrink_model(model, SHRINKERS.create(method, **settings), TEXT)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TEXT).logits


@pytest.mark.parametrize("method", sorted(SHRINKERS))
@pytest.mark.parametrize("tied", [False, True])
def test_the_asked_share_goes_and_plain_transformers_loads_the_rest(method: str, tied: bool, tmp_path: Path) -> None:
    model = build_tiny_llama(**SIZES, tie_word_embeddings=tied)
    settings = {} if method == "shortgpt" else {"multiple_of": 2}
    share = 1 / 6 if method == "slicegpt" else 0.25  # the width must be a multiple of the 8 heads
    summary = shrunk(model, method, sparsity=share, **settings)
    assert summary.sparsity == pytest.approx(share, abs=0.02 if method == "flap" else 0.012)  # biases weigh here
    loaded = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path / "model"))
    torch.testing.assert_close(logits(loaded), logits(model))
    if method in WIDTH:
        assert (model.config.num_key_value_heads, model.config.num_attention_heads, model.config.head_dim) == (3, 6, 8)
        assert model.config.intermediate_size % 2 == 0
        assert all(removed.isdigit() for removed in summary.removed["groups"].values())
    assert len(loaded(input_ids=TEXT[:1, :4], use_cache=True).past_key_values) == model.config.num_hidden_layers


@pytest.mark.process
def test_a_process_without_this_package_gets_the_same_logits(tmp_path: Path) -> None:
    model = build_tiny_llama(**SIZES)
    shrunk(model, "flap", sparsity=0.25, multiple_of=8)
    folder = save_model(model, tmp_path / "model")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(folder)!r}); x = torch.tensor({TEXT[:1].tolist()})\n"
        "assert not any(n.startswith('compress_peft') for n in sys.modules)\n"
        "print(m(input_ids=x).logits.double().norm().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(float(logits(model)[:1].double().norm()), rel=1e-5)


@pytest.mark.parametrize("method", WIDTH)
@torch.no_grad()
def test_dead_channels_and_groups_go_and_the_outputs_stay(method: str) -> None:
    model = build_tiny_llama(**SIZES)
    for index, parts in enumerate(anatomy(model)):
        parts.o.weight.view(48, 4, 16)[:, index % 4] = 0  # one group of each block
        parts.v.weight.view(4, 8, 48)[index % 4] = 0
        parts.q.weight.view(4, 16, 48)[index % 4] = 0
        parts.k.weight.view(4, 8, 48)[index % 4] = 0
        for layer in parts.readers:
            layer.weight[index : index + 32] = 0
        parts.down.weight[:, index : index + 32] = 0
    before = logits(model)
    summary = shrunk(model, method, sparsity=0.25, multiple_of=32)
    assert summary.removed["groups"] == {f"model.layers.{i}": str(i) for i in range(4)}
    assert summary.removed["channels"] == {f"model.layers.{i}": f"{i}-{i + 31}" for i in range(4)}
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_shortgpt_drops_the_block_that_does_nothing() -> None:
    model = build_tiny_llama(**SIZES)
    parts = anatomy(model)[2]
    parts.o.weight.zero_()
    parts.down.weight.zero_()
    before = logits(model)
    summary = shrunk(model, "shortgpt", sparsity=0.25)
    assert summary.removed == {"blocks": "2"} and summary.scores["model.layers.2"][0] == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(logits(model), before)
    assert block_influence(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])).item() == pytest.approx(1 - 24 / 25)


def test_influence_is_over_the_real_hidden_states_and_layer_types_are_cut() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, initializer_range=0.2, use_sliding_window=True, sliding_window=8, max_window_layers=2,
        )
    ).eval()  # fmt: skip
    types = list(model.config.layer_types)
    model.config.layer_types = types
    assert len(set(types)) == 2
    with torch.no_grad():
        states = model(input_ids=TEXT, output_hidden_states=True).hidden_states
    first = block_influence(states[0], states[1]).mean().item()
    summary = shrunk(model, "shortgpt", sparsity=0.5)
    assert summary.scores["model.layers.0"][0] == pytest.approx(first, rel=1e-5)
    assert len(model.config.layer_types) == 2 == len(model.model.layers)


def test_taylor_scores_equal_their_formulas() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.5]])
    fisher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])

    def score(dim: int, **settings: Any) -> list[float]:
        return SHRINKERS.create("llm_pruner", **settings).score(weight, gradient, fisher, dim).tolist()

    assert score(1, order="first") == [3, 5]  # |1| + |-2|, |-3| + |2|
    assert score(0, order="first") == [4, 4]
    assert score(1, order="first", importance="vector") == [1, 1]  # |1 - 2|, |-3 + 2|
    assert score(1) == [1, 8]  # 0.5 * 2 * 1, 0.5 * 1 * 16
    assert score(1, order="mixed") == [2, 9]  # |1 - 1| + |-2|, |-3| + |2 - 8|
    assert score(1, order="mixed", importance="vector") == [2, 9]
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    for aggregation, expected in {"sum": [4, 6], "mean": [2, 3], "max": [3, 5], "last": [3, 1]}.items():
        assert SHRINKERS.create("llm_pruner", aggregation=aggregation).aggregate(scores).tolist() == expected


def test_fluctuation_equals_its_formula_and_the_bias_makes_up_for_constants() -> None:
    inputs, weight = torch.randn(50, 6) + 2, torch.randn(3, 6)
    stats = InputStatistics(tokens=50, square_sum=inputs.square().sum(0), sum=inputs.sum(0))
    expected = inputs.var(0, correction=0) * weight.norm(dim=0) ** 2
    torch.testing.assert_close(fluctuation(weight, stats).float(), expected, rtol=1e-4, atol=1e-4)
    errors = []
    for compensate in (True, False):
        model = build_tiny_llama(initializer_range=0.2)
        before = logits(model)
        shrunk(model, "flap", sparsity=0.2, multiple_of=8, parts="mlp", compensate=compensate)
        errors.append(float((logits(model) - before).norm()))
        assert bool(getattr(model.config, "mlp_bias", False)) == compensate
    assert errors[0] < errors[1]


def test_impossible_things_are_refused_and_nothing_changes() -> None:
    model = build_tiny_llama()
    keys = {name: p.shape for name, p in model.named_parameters()}
    for method, settings, words in (
        ("shortgpt", {"sparsity": 0.1}, "is 0 blocks"),
        ("flap", {"sparsity": 0.02}, "comes near 0.02"),
        ("llm_pruner", {"sparsity": 0.9, "parts": "mlp"}, "leave nothing"),
    ):
        with pytest.raises(ModelError, match=words):
            shrunk(model, method, **settings)
    assert keys == {name: p.shape for name, p in model.named_parameters()}
    quantize_model(model, QUANTIZERS.create("rtn", group_size=32))
    for method in SHRINKERS:
        with pytest.raises(ModelError, match="compressed already"):
            shrunk(model, method, sparsity=0.5)


def test_only_as_many_heads_stay_as_transformers_takes() -> None:
    model = build_tiny_llama(
        num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8
    )  # 7, 6, 5 do not divide 64
    summary = shrunk(model, "flap", sparsity=0.25, multiple_of=2)
    assert "groups" not in summary.removed and summary.sparsity == pytest.approx(0.25, abs=0.015)
    with pytest.raises(ModelError, match="8 key/value groups"):
        shrunk(build_tiny_llama(num_attention_heads=8, num_key_value_heads=8), "flap", parts="attention", sparsity=0.05)


def test_ranges() -> None:
    assert ranges({7, 1, 2, 3, 9}) == "1-3, 7, 9" and ranges([]) == ""


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_minitron_narrows_the_residual_stream(tied: bool, tmp_path: Path) -> None:
    model = build_tiny_llama(**SIZES, tie_word_embeddings=tied)
    summary = shrunk(model, "minitron", sparsity=0.5, hidden_size=36, multiple_of=2)
    assert summary.sparsity == pytest.approx(0.5, abs=0.012) and summary.sizes["hidden_size"] == 36
    loaded = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path / "model"))
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(ModelError, match="hidden_size"):
        shrunk(build_tiny_llama(), "minitron", sparsity=0.2, hidden_size=32)


@torch.no_grad()
def test_minitron_scores_are_those_of_the_activations() -> None:
    model = build_tiny_llama(**SIZES)
    seen: list[Tensor] = []
    parts = anatomy(model)[1]
    handles = [layer.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for layer in (parts.o, parts.down)]
    logits(model)
    for handle in handles:
        handle.remove()
    norms = torch.stack([head.norm(dim=-1) for head in seen[0].split(8, dim=-1)], -1)  # (samples, tokens, heads)
    by_group = torch.stack([norms[..., 2 * g] + norms[..., 2 * g + 1] for g in range(4)], -1)
    expected = by_group.mean(1).norm(dim=0)
    neurons = seen[1].abs().mean(1).norm(dim=0)
    summary = shrunk(model, "minitron", sparsity=0.25, multiple_of=2)
    found = torch.tensor(summary.scores["model.layers.1"])
    torch.testing.assert_close(found.sqrt().float(), expected, rtol=1e-4, atol=1e-5)
    gone = neurons.argsort()[: 128 - summary.sizes["intermediate_size"]].tolist()
    assert summary.removed["channels"]["model.layers.1"] == ranges(gone)


@torch.no_grad()
def test_minitron_keeps_the_stream_channels_that_the_norms_give_most() -> None:
    model = build_tiny_llama(**SIZES)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "norm" in name:
            parameter.copy_(torch.rand(48, generator=torch.Generator().manual_seed(index)))
    seen: dict[str, Tensor] = {}
    norms = {name: module for name, module in model.named_modules() if name.endswith("norm")}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name, module in norms.items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    assert len(seen) == 9
    expected = torch.stack([output.abs().mean(1).norm(dim=0) for output in seen.values()]).sum(0)
    summary = shrunk(model, "minitron", sparsity=0.25, hidden_size=40, multiple_of=2)
    assert summary.removed["hidden"] == ranges(expected.argsort()[:8].tolist())

"""The block walk against the whole model run by transformers, with plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress_peft.errors import DataError, ModelError
from compress_peft.models import statistics as statistics_module
from compress_peft.models import walk as walk_module
from compress_peft.models.layers import decoder_layers, linear_layers
from compress_peft.models.walk import BlockWalk
from tests.conftest import build_tiny_llama

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        # Blocks with different masks.
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "gpt_neox": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma3_text": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "bloom": {"n_head": 4, "n_layer": 3},
    "mixtral": {"intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 4},
}


def build(kind: str) -> nn.Module:
    settings = SMALL | {"max_position_embeddings": 64, "initializer_range": 0.2} | SIZES[kind]
    config = AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases, too, must not be zero
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(samples: int = 6, length: int = 12, vocabulary: int = 64) -> Tensor:
    return torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(3))


def inputs_of(model: nn.Module, calibration: Tensor) -> dict[str, Tensor]:
    """What reaches every linear layer in the blocks, (tokens, in), when transformers runs the model."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, name=name: found.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))
        )
        for name, layer in linear_layers(model)
    ]
    with torch.no_grad():
        for row in calibration:
            model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def close(found: Tensor, want: Tensor) -> bool:
    return bool((found.double() - want).abs().max() <= 1e-4 * want.abs().max())


@pytest.mark.parametrize("kind", SIZES)
def test_hessians_are_those_of_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "CHUNK_TOKENS", 24)  # two rows a pass
    model, calibration = build(kind), tokens()
    before = [p.clone() for p in model.parameters()]
    want = inputs_of(model, calibration)
    found = {}
    model.train()  # the walk must not see dropout
    for turn in BlockWalk(model, calibration, dict(linear_layers(model)), progress=False):
        found |= turn.statistics
    assert model.training
    assert set(found) == {name for name, _ in linear_layers(model)}
    for name, inputs in want.items():
        assert found[name].tokens == len(inputs)
        assert close(found[name].hessian, inputs.T @ inputs), name
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("needs", [("norms",), ()])
def test_norms_alone_cost_no_products(needs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "CHUNK_TOKENS", 24)
    monkeypatch.setattr(statistics_module, "add_gram", None)  # a call would fail
    model = build("llama")
    want = inputs_of(model, tokens())
    found = {}
    for turn in BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False, needs=needs):
        found |= turn.statistics
    assert found.keys() == want.keys()
    for name, inputs in want.items():
        value = found[name]
        assert value.hessian is None and value.drift is None and value.tokens == len(inputs)
        assert close(value.square_sum, inputs.square().sum(0)) and close(value.sum, inputs.sum(0))


def test_norms_beside_the_hessian_are_its_diagonal() -> None:
    model = build("llama")
    for turn in BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False):
        for value in turn.statistics.values():
            assert value.hessian is not None and torch.equal(value.square_sum, value.hessian.diagonal())
            assert value.sum.abs().max() > 0


def test_inputs_alone_cost_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "Collector", None)
    model = build("llama")
    states: list[Tensor] = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    model(input_ids=tokens())
    hook.remove()
    for index, turn in enumerate(BlockWalk(model, tokens(), {}, progress=False, needs=("inputs",))):
        assert not turn.statistics
        if index == 1:
            assert close(torch.cat(list(turn.inputs)), states[0].double())


def test_drift_is_that_between_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """(X_original - X)^T X, with the first block changed and the others dense when their turn comes."""
    monkeypatch.setattr(walk_module, "CHUNK_TOKENS", 24)
    model, twin = build("llama"), build("llama")
    original = inputs_of(twin, tokens())
    for parameter in twin.model.layers[0].parameters():
        parameter.data.mul_(1.5)
    changed = inputs_of(twin, tokens())
    walk = BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False, needs=("hessian", "drift"))
    for turn in walk:
        for name, value in turn.statistics.items():
            if turn.name == "model.layers.0":
                assert value.drift is not None and not value.drift.any()
                continue
            before, now = original[name], changed[name]
            assert value.hessian is not None and close(value.hessian, now.T @ now), name
            assert value.drift is not None and close(value.drift, (before - now).T @ now), name
        if turn.name == "model.layers.0":
            for parameter in turn.block.parameters():
                parameter.data.mul_(1.5)


def test_targets_are_the_outputs_of_the_unchanged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "CHUNK_TOKENS", 24)
    model, twin = build("llama"), build("llama")
    want: list[Tensor] = []
    for _, block in decoder_layers(twin):
        block.register_forward_hook(lambda _, __, out: want.append(out))
    twin(input_ids=tokens())
    for index, turn in enumerate(BlockWalk(model, tokens(), {}, progress=False, needs=("inputs", "targets"))):
        assert len(turn.targets) == len(turn.inputs) == 6, "a row a pass: half of the tokens, as the block is trained"
        assert not turn.statistics
        assert close(torch.cat(list(turn.targets)), want[index].double())
        assert close(torch.cat([turn.run(states) for states in turn.inputs]), want[index].double()) == (index == 0)
        for parameter in turn.block.parameters():
            parameter.data.mul_(1.5)
    assert index == 2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gemma3_text"])
def test_a_turn_runs_its_block_as_it_is(kind: str) -> None:
    """With its mask and positions, with gradients, and with what was changed meanwhile."""
    model = build(kind)
    blocks = dict(decoder_layers(model))
    outputs: dict[str, Tensor] = {}
    for name, block in blocks.items():
        block.register_forward_hook(
            lambda _, __, out, name=name: outputs.__setitem__(name, out if isinstance(out, Tensor) else out[0])
        )
    model(input_ids=tokens())
    want = {name: out.double() for name, out in outputs.items()}
    for turn in BlockWalk(model, tokens(), {}, progress=False, needs=("inputs",)):
        assert turn.block is blocks[turn.name] and not turn.inputs[0].requires_grad
        out = turn.run(turn.inputs[0])
        assert close(out, want[turn.name]) and out.requires_grad
        parameter = [p for p in turn.block.parameters() if p.dim() == 2][-1]
        assert torch.autograd.grad(out.sum(), parameter)[0].abs().max() > 0
        kept = parameter.detach().clone()
        parameter.data[0].mul_(9)
        assert not close(turn.run(turn.inputs[0]), want[turn.name])
        parameter.data.copy_(kept)


def test_a_walk_without_calibration() -> None:
    model = build("llama")
    turns = list(BlockWalk(model, None, dict(linear_layers(model)), progress=False, needs=()))
    assert [len(turn.layers) for turn in turns] == [7, 7, 7]
    assert not any(turn.statistics or turn.inputs for turn in turns)


def test_layers_with_one_input_share_one_hessian() -> None:
    model = build("llama")
    for turn in BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False):
        by_kind = {name.rpartition(".")[2]: value for name, value in turn.statistics.items()}
        assert by_kind["q_proj"] is by_kind["k_proj"] is by_kind["v_proj"]
        assert by_kind["gate_proj"] is by_kind["up_proj"]
        assert len({id(value) for value in by_kind.values()}) == 4


def test_the_next_block_sees_the_outputs_of_the_changed_one() -> None:
    """Whatever is done to a block, the statistics after it are those of the model with that change."""
    calibration = tokens()
    model, twin = build("llama"), build("llama")
    first = next(iter(dict(decoder_layers(twin)).values()))
    unchanged = inputs_of(twin, calibration)
    for parameter in first.parameters():
        parameter.data.mul_(1.5)
    want = inputs_of(twin, calibration)
    layers = dict(linear_layers(model))
    for index, turn in enumerate(BlockWalk(model, calibration, layers, progress=False)):
        for name, value in turn.statistics.items():
            inputs = (unchanged if index == 0 else want)[name]
            assert close(value.hessian, inputs.T @ inputs), name
            if index == 1:
                assert not close(value.hessian, unchanged[name].T @ unchanged[name]), name
        if index == 0:
            for parameter in dict(decoder_layers(model))["model.layers.0"].parameters():
                parameter.data.mul_(1.5)


def test_gradients_stay_on_between_the_blocks() -> None:
    model = build("llama")
    for _ in BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False):
        assert torch.is_grad_enabled()


def test_only_the_wanted_layers() -> None:
    model = build("llama")
    wanted = {name: layer for name, layer in linear_layers(model) if name == "model.layers.1.mlp.up_proj"}
    turns = list(BlockWalk(model, tokens(), wanted, progress=False))
    assert [list(turn.statistics) for turn in turns] == [[], ["model.layers.1.mlp.up_proj"], []]


def test_a_layer_that_no_token_reaches() -> None:
    model = build("llama")
    block = model.model.layers[1]
    block.mlp.unused = nn.Linear(32, 8)
    turn = list(BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False))[1]
    unused = turn.statistics["model.layers.1.mlp.unused"]
    assert unused.tokens == 0 and not unused.hessian.any() and "no calibration token" in unused.notes[0]


def test_a_layer_that_is_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "CHUNK_TOKENS", 24)
    model = build("llama")
    for block in model.model.layers:
        block.mlp.up_proj = block.mlp.gate_proj
    found = {}
    for turn in BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False):
        found |= turn.statistics
    want = inputs_of(model, tokens())
    assert len(found) == 18 and found["model.layers.0.mlp.gate_proj"].tokens == 2 * 72
    assert all(close(found[name].hessian, inputs.T @ inputs) for name, inputs in want.items())


def test_one_block_alone() -> None:
    model = build_tiny_llama(num_hidden_layers=1)
    (turn,) = BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False)
    want = inputs_of(model, tokens())
    assert all(close(turn.statistics[name].hessian, inputs.T @ inputs) for name, inputs in want.items())


def test_arguments_that_depend_on_the_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "CHUNK_TOKENS", 12)
    model = build("llama")
    block = model.model.layers[0]
    forward = block.forward

    def with_text(hidden: Tensor, **kwargs: Any) -> Tensor:
        return forward(hidden, **kwargs)

    block.forward = with_text
    block.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"extra": args[0]}), with_kwargs=True)
    with pytest.raises(ModelError, match="depend on the text"):
        list(BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False))
    assert block.forward is with_text


def test_broken_activations_name_the_layers() -> None:
    model = build("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj: NaN"):
        list(BlockWalk(model, tokens(), dict(linear_layers(model)), progress=False))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64 \(samples, length\)"),
        (torch.zeros(3, 4), "float32"),
        (torch.zeros(0, 4, dtype=torch.int64), r"\(0, 4\)"),
        (torch.full((1, 4), 64), "64 for a vocabulary of 64"),
        (torch.zeros(1, 65, dtype=torch.int64), "64 positions"),
    ],
)
def test_calibration_that_does_not_fit(calibration: Tensor, message: str) -> None:
    model = build("llama")
    with pytest.raises(DataError, match=message):
        BlockWalk(model, calibration, dict(linear_layers(model)))

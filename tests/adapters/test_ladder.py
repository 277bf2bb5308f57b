"""Ladder side tuning: its formula, what is cut out of the backbone, and what the backward pass keeps."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from compress_peft.adapters import LadderSideTuning, Lora
from compress_peft.errors import ConfigError, ModelError
from tests.adapters.helpers import perturb, prompts
from tests.conftest import build_tiny_llama

D, BLOCKS = 64, 4


def llama():
    return build_tiny_llama(num_hidden_layers=BLOCKS)


def attached(**settings):
    torch.manual_seed(0)
    model = LadderSideTuning(**{"reduction": 2, **settings}).attach(llama())
    return model, model.get_base_model().model.norm.ladder_side["default"]


@pytest.mark.parametrize(("every", "chosen"), [(2, [1, 3]), (1, [0, 1, 2, 3]), (3, [2, 3])])
def test_ladder_by_its_formula(every, chosen):
    """Hidden states of an ordinary forward pass, the gates and blocks one after the other."""
    model, side = attached(every=every)
    assert side.chosen == chosen
    perturb(model, size=0.2)
    tokens, plain = prompts(), llama()
    states = plain.model(tokens, output_hidden_states=True).hidden_states
    blocks = {}
    for number, block in enumerate(plain.model.layers):
        block.register_forward_hook(lambda m, a, o, number=number: blocks.update({number: o}))
    plain(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary = plain.model.rotary_emb(states[0], positions)
    hidden = states[0] @ side.first.weight.T + side.first.bias
    for index, number in enumerate(chosen):
        gate = torch.sigmoid(side.gates[index] / 0.1)
        hidden = gate * hidden + (1 - gate) * side.down[index](blocks[number])
        hidden = side.side_blocks[index](hidden, attention_mask=None, position_embeddings=rotary)
    expected = plain.lm_head(side.up(side.norm(hidden)))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_side_blocks_are_cut_out_of_the_backbone():
    """The kept rows and columns by hand; with nothing to cut, the whole block."""
    plain = llama()
    _, side = attached()
    kept = torch.zeros(D)
    for block in plain.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            kept += layer.weight.abs().sum(dim=0)
        for layer in (attention.o_proj, mlp.down_proj):
            kept += layer.weight.abs().sum(dim=1)
    kept = kept.argsort(descending=True)[: D // 2].sort().values
    source, small = plain.model.layers[1], side.side_blocks[0]
    neurons = sum(layer.weight.abs().sum(1) for layer in (source.mlp.gate_proj, source.mlp.up_proj))
    neurons = (neurons + source.mlp.down_proj.weight.abs().sum(0)).argsort(descending=True)[:64].sort().values
    torch.testing.assert_close(small.mlp.up_proj.weight, source.mlp.up_proj.weight[neurons][:, kept])
    torch.testing.assert_close(small.mlp.down_proj.weight, source.mlp.down_proj.weight[kept][:, neurons])
    torch.testing.assert_close(small.input_layernorm.weight, source.input_layernorm.weight[kept])
    # one of two keys with its two heads of 16
    attention = source.self_attn
    group = max(
        range(2),
        key=lambda g: float(
            attention.q_proj.weight[32 * g : 32 * g + 32].abs().sum()
            + sum(p.weight[16 * g : 16 * g + 16].abs().sum() for p in (attention.k_proj, attention.v_proj))
            + attention.o_proj.weight[:, 32 * g : 32 * g + 32].abs().sum()
        ),
    )
    heads = slice(32 * group, 32 * group + 32)
    torch.testing.assert_close(small.self_attn.q_proj.weight, attention.q_proj.weight[heads][:, kept])
    torch.testing.assert_close(small.self_attn.o_proj.weight, attention.o_proj.weight[kept][:, heads])
    _, whole = attached(reduction=1)
    for name, parameter in plain.model.layers[3].named_parameters():
        torch.testing.assert_close(whole.side_blocks[1].get_parameter(name), parameter)


def test_parameter_count_is_that_of_the_docstring():
    adapter = LadderSideTuning(reduction=2)
    small, heads, keys, neurons, places = 32, 32, 16, 64, 2
    block = small * (2 * heads + 2 * keys) + 3 * small * neurons + 2 * small
    ladder = (places + 1) * (D * small + small) + places + small * D + D + small
    assert adapter.parameter_counts(adapter.attach(llama()))["trainable"] == ladder + places * block
    with torch.device("meta"):
        empty = llama()
    assert adapter.estimate_parameters(empty) == ladder + places * block


def saved_for_backward(model, tokens) -> dict[int, torch.Tensor]:
    """The tensors that autograd keeps of a training step's forward pass, by the place of their storage."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train()(input_ids=tokens, labels=tokens)
    return kept


def test_no_gradient_flows_through_the_backbone():
    """Its blocks give tensors without a graph, and nothing of theirs is kept for the backward pass."""
    tokens = prompts(4, 64)
    model, side = attached(reduction=4)
    inside = []
    for block in model.get_base_model().model.layers:
        for module in block.modules():
            module.register_forward_hook(lambda m, a, output: inside.append(output))
    kept = saved_for_backward(model, tokens)
    tensors = [t for output in inside for t in (output if isinstance(output, tuple) else [output]) if t is not None]
    assert len(tensors) > 4 * BLOCKS and all(t.grad_fn is None for t in tensors)
    weights = {p.untyped_storage().data_ptr() for p in model.get_base_model().model.layers.parameters()}
    assert not weights & set(kept)
    outputs = {t.untyped_storage().data_ptr() for t in tensors}
    read = len(outputs & set(kept))  # the way down needs its inputs for its own gradient
    assert read <= len(side.chosen)


def test_less_is_kept_than_for_lora():
    """Activations alone; the paper has a third of LoRA's total memory for T5-base."""
    tokens = prompts(4, 64)
    size = {"intermediate_size": 256, "hidden_size": 128, "num_hidden_layers": 8}
    amounts = {}
    for name, adapter in {
        "lst": LadderSideTuning(reduction=4),
        "lora": Lora(target_modules=("q_proj", "v_proj")),
    }.items():
        model = adapter.attach(build_tiny_llama(**size))
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = saved_for_backward(model, tokens)
        amounts[name] = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in owned)
    assert amounts["lst"] < amounts["lora"] / 2.5, amounts


def test_two_ladders_and_going_back():
    model, _ = attached()
    first = model(prompts()).logits
    LadderSideTuning(reduction=4, every=1).attach(model, "second")
    second = model(prompts()).logits
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(model(prompts()).logits, first)
    with pytest.raises(ConfigError, match="2 adapters are active at once"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="no weight that is equal"):
        model.merge_and_unload()
    back = model.unload()
    assert torch.equal(back(prompts()).logits, llama()(prompts()).logits)
    assert not any(block._forward_hooks for block in back.model.layers)


def test_a_window_in_the_cache():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = MistralConfig(**shape, num_key_value_heads=2, vocab_size=128, sliding_window=6, initializer_range=0.1)
    model = LadderSideTuning(reduction=2).attach(MistralForCausalLM(config)).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompts())
    with_cache, without = (
        model.generate(input_ids=prompts(), attention_mask=mask, use_cache=use, **settings) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_what_it_cannot_take():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    with pytest.raises(ModelError, match="separate queries, keys and values"):
        LadderSideTuning().attach(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=48)))
    with pytest.raises(ConfigError, match="leaves nothing of a hidden size of 64"):
        LadderSideTuning(reduction=65).attach(llama())
    model, _ = attached()
    with pytest.raises(ModelError, match="adds dynamic ones"):
        model.generate(input_ids=prompts(), max_new_tokens=2, cache_implementation="static", disable_compile=True)

"""Whole blocks by one call of C: what transformers computes, wherever it is called, and only there."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from compress_peft.adapters import ADAPTERS
from compress_peft.models.growing_cache import grow_in_place
from compress_peft.pruning.structured import SHRINKERS, shrink_model
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.weights import blocks, native
from compress_peft.weights.inference import use_kernels
from tests.adapters.helpers import adapted, perturb, prompts
from tests.conftest import build_tiny_llama

pytestmark = pytest.mark.skipif(not native.has_dense(), reason="there are no C kernels here")

SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=100, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
SAME = [
    LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    LlamaConfig(**SIZES, head_dim=8, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    MistralConfig(**SIZES, sliding_window=None),
    Qwen2Config(**SIZES),
    Qwen3Config(**SIZES, head_dim=24),
]
OTHERS = [
    GraniteConfig(**SIZES, residual_multiplier=0.5),
    LlamaConfig(**SIZES, hidden_act="gelu"),
    Gemma2Config(**SIZES, head_dim=16),
    PhiConfig(**{key: value for key, value in SIZES.items() if key != "pad_token_id"}),
]
TEXT = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Grows by one at each block: the rows it had."""
    found: list[int] = []
    run = native.decode_block
    monkeypatch.setattr(native, "decode_block", lambda block, x, *rest: (found.append(len(x)), run(block, x, *rest)))
    return found


def model_of(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # biases and norms too, which start at zero and one
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


@torch.no_grad()
def decoded(model: Any, rows: int = 1, steps: int = 4, padded: bool = False, growing: bool = True) -> Tensor:
    """Logits of a prompt and of `steps` tokens after it, (rows, 1 + steps, vocabulary)."""
    ids = torch.randint(3, 128, (rows, 6 + steps), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(rows, 6, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    cache = DynamicCache(config=model.config)
    if growing:
        grow_in_place(cache)
    found = [model(input_ids=ids[:, :6], attention_mask=mask, past_key_values=cache).logits[:, -1:]]
    for step in range(steps):
        mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.long)], dim=1)
        inputs = {"attention_mask": mask} if padded else {}
        found.append(model(input_ids=ids[:, 6 + step, None], past_key_values=cache, **inputs).logits)
    return torch.cat(found, dim=1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("config", SAME, ids=lambda config: config.model_type)
def test_it_is_what_transformers_computes(config, rows, padded, calls):
    model = model_of(config)
    want = decoded(model, rows, padded=padded)
    use_kernels(model)
    got = decoded(model, rows, padded=padded)
    close(got, want)
    assert calls == [rows] * (2 + 2 * 4)  # to try the two blocks, then both at each token


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_blocks_that_compute_something_else_are_found_out(config, calls):
    model = model_of(config)
    want = decoded(model)
    use_kernels(model)
    close(decoded(model), want)
    assert len(calls) <= 2  # to try


def test_a_block_is_tried_even_where_another_of_its_class_was_right(calls):
    for factor in (1.0, 0.5):
        model = model_of(GraniteConfig(**SIZES, residual_multiplier=factor))
        want = decoded(model)
        calls.clear()
        use_kernels(model)
        close(decoded(model), want)
        assert len(calls) == (2 + 2 * 4 if factor == 1 else 2)


def test_more_tokens_than_the_cache_had_room_for(calls):
    model = model_of(SAME[0])
    want = decoded(model, 2, steps=150)
    use_kernels(model)
    close(decoded(model, 2, steps=150), want)


def test_a_row_does_not_depend_on_the_others():
    model = build_tiny_llama()
    use_kernels(model)
    together = decoded(model, 5)
    ids = torch.randint(3, 128, (5, 10), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for row in range(5):
            cache = grow_in_place(DynamicCache(config=model.config))
            model(input_ids=ids[row, None, :6].repeat(5, 1), past_key_values=cache)  # the prompts are torch's
            cache.batch_select_indices(torch.tensor([0]))
            for step in range(4):
                alone = model(input_ids=ids[row, None, 6 + step, None], past_key_values=cache).logits
            assert torch.equal(alone[0], together[row, -1:])


KINDS = [("nf4", {"double_quant": True}), ("nf4", {"double_quant": False}), ("fp4", {})]
KINDS += [("rtn", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)]
KINDS += [("rtn", {"bits": 4, "group_size": None, "symmetric": True})]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("method", "settings"), KINDS, ids=str)
def test_compressed_weights(method, settings, rows, calls):
    config = LlamaConfig(**SIZES | {"intermediate_size": 128}, attention_bias=True)
    plain, model = model_of(config), model_of(config)
    use_kernels(model)
    decoded(model)  # as dense ones: what was written down then must not be used now
    for each in (plain, model):
        quantize_model(each, QUANTIZERS.create(method, **settings), TEXT, progress=False)
    want = decoded(plain, rows)
    calls.clear()
    close(decoded(model, rows), want)
    assert calls == [rows] * 2 * 4
    decoded(model.to(torch.bfloat16))  # which exchanges the weights for others
    assert len(calls) == 2 * 4
    for each in (plain.to(torch.bfloat16), plain, model):
        each.float()
    close(decoded(model, rows), decoded(plain, rows))
    assert calls == [rows] * 2 * 2 * 4


@pytest.mark.parametrize("method", ["flap", "shortgpt", "slicegpt", "minitron"])
def test_pruned_blocks(method, calls):
    models = [build_tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4) for _ in range(2)]
    use_kernels(models[1])
    for model in models:
        shrink_model(model, SHRINKERS.create(method, sparsity=0.25), TEXT)
    want = decoded(models[0])
    calls.clear()
    close(decoded(models[1]), want)
    assert len(calls) >= 4 * len(models[1].model.layers)


@pytest.mark.parametrize("rows", [1, 3])
def test_para_scales_inside(rows, calls):
    said = []
    for quick in (False, True):
        model = build_tiny_llama()
        if quick:
            use_kernels(model)
        peft_model = adapted(model)
        ids = prompts(rows, 6)
        mask = torch.ones_like(ids)
        options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        options |= dict(return_dict_in_generate=True, output_logits=True, pad_token_id=0)
        cache = grow_in_place(DynamicCache(config=model.config))
        out = peft_model.generate(input_ids=ids, past_key_values=cache, **options)
        said.append(torch.stack(out.logits))
        with peft_model.disable_adapter():
            said.append(decoded(peft_model, rows))
        said.append(decoded(peft_model.unload(), rows))
    for want, got in zip(said[:3], said[3:], strict=True):
        close(got, want)
    assert len(calls) == 2 + 2 * 7 + 2 * 2 * 4
    assert (said[1] - said[2]).abs().max() == 0  # the bare backbone both times


def replaced_data(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 3


def other_parameter(model: Any) -> None:
    layer = model.model.layers[1].self_attn.v_proj
    layer.weight = nn.Parameter(layer.weight * 3)


def other_layer(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=True)
    torch.nn.init.constant_(mlp.down_proj.weight, 0.1)
    torch.nn.init.constant_(mlp.down_proj.bias, 0.5)


def in_place(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.weight.data.mul_(2)


def hook(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def forward_of_a_layer(model: Any) -> None:
    layer = model.model.layers[1].self_attn.q_proj
    layer.forward = lambda x, before=layer.forward: 2 * before(x)


def lora(model: Any) -> None:
    torch.manual_seed(0)
    perturb(ADAPTERS.create("lora", r=4).attach(model).eval())


def ia3(model: Any) -> None:
    perturb(ADAPTERS.create("ia3").attach(model).eval())


def new_bias(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(64))


def new_norm(model: Any) -> None:
    model.model.layers[0].input_layernorm.weight = nn.Parameter(torch.full((64,), 1.5))


def double(model: Any) -> None:
    model.model.double().float()


CHANGES = [
    replaced_data, other_parameter, other_layer, in_place, hook, forward_of_a_layer, lora, ia3, new_bias,
    new_norm, double,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_after_the_first_token_count(change):
    plain, quick = build_tiny_llama(), build_tiny_llama()
    use_kernels(quick)
    before = decoded(quick)
    for model in (plain, quick):
        torch.manual_seed(0)
        change(model)
    want = decoded(plain)
    close(decoded(quick), want)
    if change is not double:
        assert (want - before).abs().max() > 1e-3


def test_a_copy_has_weights_of_its_own(calls):
    model = build_tiny_llama()
    use_kernels(model)
    before = decoded(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    calls.clear()
    changed = decoded(other)
    assert len(calls) == 2 + 2 * 4 and (changed - before).abs().max() > 1e-3
    assert torch.equal(decoded(model), before)


def test_nothing_is_kept_alive():
    model = build_tiny_llama()
    use_kernels(model)
    decoded(model)
    layer = model.model.layers[0].mlp.up_proj
    weight, module = weakref.ref(layer.weight), weakref.ref(model.model.layers[0])
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    gc.collect()
    assert weight() is None
    peft_model = adapted(model)
    peft_model.generate(input_ids=prompts(1, 6), max_new_tokens=3, pad_token_id=0)
    del layer, model, peft_model
    gc.collect()
    assert module() is None


def test_what_goes_the_usual_way(calls):
    model = build_tiny_llama()
    use_kernels(model)
    want = decoded(model)
    calls.clear()
    close(decoded(model, growing=False), want)
    model.set_attn_implementation("eager")
    close(decoded(model), want)
    model.set_attn_implementation("sdpa")
    close(decoded(model), want)
    model.set_attn_implementation(blocks.USED)
    close(decoded(model.train()), want)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        decoded(model)
    decoded(build_tiny_llama().bfloat16())
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        close(decoded(model), want)
    finally:
        handle.remove()
    cache = grow_in_place(DynamicCache(config=model.config))
    ids = torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    loss = model(input_ids=ids[:, :1], past_key_values=cache).logits.sum()
    loss.backward()  # gradients are recorded
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    assert not calls
    decoded(model, rows=17)  # more rows than the products of few rows take
    assert not calls
    decoded(model)
    assert len(calls) == 2 * 4


def test_attentions_and_hidden_states_come_out(calls):
    plain, model = build_tiny_llama(), build_tiny_llama()
    use_kernels(model)
    found = []
    for each in (plain, model):
        cache = grow_in_place(DynamicCache(config=each.config))
        with torch.no_grad():
            each(input_ids=TEXT[:1, :6], past_key_values=cache)
            found.append(each(input_ids=TEXT[:1, 6:7], past_key_values=cache, output_hidden_states=True).hidden_states)
    for want, got in zip(*found, strict=True):
        close(got, want)

"""PARA as a peft tuner: equations, shapes, several adapters, saving."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.activations import ACT2FN

from compress_peft.adapters import Para, trainable_parameters
from compress_peft.adapters.para_layer import ParaConfig, ParaLayer
from compress_peft.errors import ConfigError, ModelError
from tests.adapters.helpers import CountVectors, adapted, padded, para_layers, perturb, prompts
from tests.conftest import build_tiny_llama

TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)


def test_the_output_is_the_backbones_at_the_start(tiny_llama):
    tokens, mask = padded("left")
    settings = dict(attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        expected = tiny_llama(tokens, **settings)
        found = Para().attach(tiny_llama)(tokens, **settings)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_the_output_is_the_backbones_at_the_start_in_bfloat16():
    model = build_tiny_llama().to(torch.bfloat16)
    expected = model(prompts()).logits
    peft_model = Para().attach(model)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}
    uncast = get_peft_model(build_tiny_llama().to(torch.bfloat16), ParaConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in uncast.parameters() if p.requires_grad} == {torch.float32}
    found = peft_model(prompts()).logits
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    perturb(peft_model)
    settings = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False)
    tokens, mask = prompts(), torch.ones(3, 9, dtype=torch.long)
    said = peft_model.generate(input_ids=tokens, attention_mask=mask, **settings)
    with peft_model.disable_adapter():
        assert not torch.equal(said, peft_model.generate(input_ids=tokens, attention_mask=mask, **settings))


def test_a_model_cast_as_a_whole_still_runs():
    model = adapted(build_tiny_llama()).to(torch.bfloat16)
    expected = adapted(build_tiny_llama())(prompts()).logits
    found = model(prompts()).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_initialization():
    model = Para(r=64, init_std=0.05).attach(build_tiny_llama())
    for layer in para_layers(model):
        assert layer.para_down["default"].std().item() == pytest.approx(0.05, rel=0.1)
        assert torch.equal(layer.para_up["default"], torch.zeros(64, 64 + 32 + 128))
        assert torch.equal(layer.para_bias["default"], torch.ones(64 + 32 + 128))


def naive_block(model, hidden, prompt_end, down, up, bias, activation):
    """Equations 1-6 for the first block, head by head and row by row. hidden: (batch, T, 64)."""
    block, config = model.model.layers[0], model.config
    width, per_group = config.hidden_size // config.num_attention_heads, 2
    cos, sin = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])

    def rotate(x):  # (T, width)
        half = width // 2
        return x * cos[0] + torch.cat([-x[:, half:], x[:, :half]], dim=1) * sin[0]

    rows = []
    for row in range(hidden.shape[0]):
        pooled = hidden[row, prompt_end[row]]
        scale = ACT2FN[activation](down.T @ pooled) @ up + bias
        l_q, l_v, l_u = scale[:64], scale[64:96], scale[96:]
        x = block.input_layernorm(hidden[row])
        query = (x @ block.self_attn.q_proj.weight.T) * l_q
        key = x @ block.self_attn.k_proj.weight.T
        value = (x @ block.self_attn.v_proj.weight.T) * l_v
        heads = []
        for head in range(config.num_attention_heads):
            group = head // per_group
            q = rotate(query[:, head * width : (head + 1) * width])
            k = rotate(key[:, group * width : (group + 1) * width])
            v = value[:, group * width : (group + 1) * width]
            scores = (q @ k.T) / width**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v)
        middle = hidden[row] + torch.cat(heads, dim=1) @ block.self_attn.o_proj.weight.T
        y = block.post_attention_layernorm(middle)
        gate = torch.nn.functional.silu(y @ block.mlp.gate_proj.weight.T)
        raised = (y @ block.mlp.up_proj.weight.T) * l_u
        rows.append(middle + (gate * raised) @ block.mlp.down_proj.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_equations_3_to_6(activation):
    tokens, end = prompts(), torch.tensor([2, 8, 5])
    bare = build_tiny_llama()
    model = adapted(build_tiny_llama(), activation=activation)
    layer = para_layers(model)[0]
    generator = [getattr(layer, name)["default"] for name in ("para_down", "para_up", "para_bias")]
    with torch.no_grad():
        found = model(tokens, prompt_end=end, output_hidden_states=True).hidden_states
        expected = naive_block(bare, bare.model.embed_tokens(tokens), end, *generator, activation)
        plain = bare(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[1], expected, atol=0.05)


@pytest.mark.parametrize(
    "build, widths",
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1, head_dim=32)), [128, 32, 128]),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**TINY, num_key_value_heads=2)), [64, 32, 128]),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, num_key_value_heads=2, head_dim=24)), [96, 48, 128]),
    ],
    ids=["heads wider than hidden", "qwen2, with biases", "qwen3"],
)
def test_other_shapes(build, widths):
    torch.manual_seed(0)
    bare = build().eval()
    tokens, mask = padded("left")
    expected = bare(tokens, attention_mask=mask).logits
    model = Para().attach(bare)
    assert torch.equal(model(tokens, attention_mask=mask).logits, expected)
    assert [layer.widths for layer in para_layers(model)] == [widths] * 2
    perturb(model)
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    cached = model.generate(input_ids=tokens, **settings)
    assert torch.equal(cached, model.generate(input_ids=tokens, use_cache=False, **settings))


def test_the_papers_parameter_count():
    """8.9 million for Llama-2-7B are the weights without the biases."""
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        model = LlamaForCausalLM(config)
    assert Para().estimate_parameters(model) == 9_560_064
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, ParaLayer) for module in model.modules())
    counts = trainable_parameters(Para().attach(model))
    assert (counts.trainable, counts.trainable_without_bias) == (9_560_064, 8_945_664)
    assert Para.count(r=12, blocks=32, hidden=4096, query=4096, value=4096, up=11008) == (8_945_664, 9_560_064)


def test_nothing_is_computed_while_disabled(tiny_llama):
    expected = tiny_llama(prompts()).logits
    model = adapted(tiny_llama)
    count = CountVectors(model)
    with model.disable_adapter():
        assert torch.equal(model(prompts(), prompt_end=torch.tensor([1, 2, 3])).logits, expected)
        assert count.made == []
    assert not torch.allclose(model(prompts()).logits, expected, atol=0.1)
    assert count.blocks == [0, 1]


def test_some_blocks_only(tiny_llama, tmp_path):
    model = adapted(tiny_llama, layers=(1,))
    count = CountVectors(model)
    logits = model(prompts()).logits
    assert count.blocks == [1]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_tiny_llama(), tmp_path)
    assert torch.equal(again(prompts()).logits, logits)
    assert trainable_parameters(model).trainable == Para().estimate_parameters(build_tiny_llama()) // 2
    for wrong in ((2,), (-1, 0), ()):
        with pytest.raises(ModelError, match="no such blocks"):
            Para(layers=wrong).attach(build_tiny_llama())


def test_two_adapters(tiny_llama, tmp_path):
    tokens = prompts()
    base = tiny_llama(tokens).logits
    model = adapted(tiny_llama, seed=1)
    first = model(tokens).logits
    Para(r=4, activation="relu").attach(model, "second")
    perturb(model, seed=2)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("default"))
    second = model(tokens).logits
    assert not torch.allclose(first, second, atol=0.1)
    model.save_pretrained(tmp_path)

    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, first)
    model.set_adapter("second")
    assert torch.equal(model(tokens).logits, second)
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    assert torch.equal(model(tokens).logits, first)
    model.load_adapter(str(tmp_path / "second"), "again")
    assert torch.equal(model(tokens).logits, first)
    model.set_adapter("again")
    assert torch.equal(model(tokens).logits, second)
    with pytest.raises(ConfigError, match="2 adapters are active"):
        model.base_model.set_adapter(["default", "again"])
    bare = model.unload()
    assert type(bare) is LlamaForCausalLM and torch.equal(bare(tokens).logits, base)


def test_unloading_leaves_nothing_behind(tiny_llama):
    names = [name for name, _ in tiny_llama.named_modules()]
    model = Para().attach(tiny_llama)
    model.get_base_model().activation_checkpointing_enable()
    bare = model.unload()
    assert [name for name, _ in bare.named_modules()] == names
    assert bare.model.layers[0].gradient_checkpointing
    for module in bare.modules():
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert Para().attach(bare)(prompts()).logits.isfinite().all()


def test_merging_by_peft_is_refused(tiny_llama):
    model = adapted(tiny_llama)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match='"bundle"'):
            merge()
    assert len(para_layers(model)) == 2


def test_a_deep_copy_is_independent(tiny_llama):
    model = adapted(tiny_llama)
    expected = model(prompts()).logits
    twin = copy.deepcopy(model)
    perturb(model, seed=7)
    assert torch.equal(twin(prompts()).logits, expected)
    assert not torch.equal(model(prompts()).logits, expected)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_get_peft_model_and_attributes_of_the_block(tiny_llama):
    tiny_llama.model.layers[0].layer_type = "full_attention"
    model = get_peft_model(tiny_llama, ParaConfig(r=3, task_type="CAUSAL_LM"))
    block = model.get_base_model().model.layers[0]
    assert isinstance(block, ParaLayer) and block.layer_type == "full_attention"
    assert block.self_attn is block.base_layer.self_attn
    with pytest.raises(AttributeError):
        block.nothing_like_this  # noqa: B018


RELOAD = """
import sys, torch
from peft import PeftModel
import compress_peft.adapters
from tests.conftest import build_tiny_llama
from tests.adapters.helpers import prompts
model = PeftModel.from_pretrained(build_tiny_llama(), sys.argv[1])
torch.save((model(prompts()).logits.detach(), [p.requires_grad for p in model.parameters()]), sys.argv[2])
"""


@pytest.mark.process
def test_saving_and_reloading_in_a_new_process(tiny_llama, tmp_path, request):
    model = adapted(tiny_llama)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(saved) == sorted(
        f"base_model.model.model.layers.{block}.para_{part}" for block in (0, 1) for part in ("down", "up", "bias")
    )
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PARA"
    out = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path), str(out)], cwd=request.config.rootpath, check=True, timeout=120
    )
    logits, trainable = torch.load(out)
    torch.testing.assert_close(logits, model(prompts()).logits)
    assert not any(trainable)


def test_blocks_that_do_not_fit_are_listed():
    model = build_tiny_llama()
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    del model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.ModuleDict({"v_proj": nn.Linear(2, 2)})])
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError) as error:
        Para().attach(model)
    said = [(problem.where, problem.what) for problem in error.value.problems]
    assert said == [
        ("model.layers.0", "q_proj is a Identity, expected a linear layer"),
        ("model.layers.1", "expected one v_proj, found 2"),
        ("model.layers.1", "expected one up_proj, found 0"),
    ]
    assert [name for name, _ in model.named_modules()] == before
    with pytest.raises(ModelError, match="unknown activation"):
        Para(activation="gelo").attach(build_tiny_llama())


def test_a_forward_that_others_have_replaced_comes_back(tiny_llama):
    linear = tiny_llama.model.layers[0].self_attn.q_proj
    plain = linear.forward

    def doubled(hidden):
        return 2 * plain(hidden)

    linear.forward = doubled
    expected = tiny_llama(prompts()).logits
    model = Para().attach(tiny_llama)
    assert torch.allclose(model(prompts()).logits, expected)
    assert model.unload() is tiny_llama and linear.forward is doubled


def test_small_changes_survive_bfloat16_outputs():
    """The product is taken in float32: bfloat16 has no number between 1 and 1.0078."""
    layer = para_layers(Para().attach(build_tiny_llama()))[0]
    linear = layer.base_layer.self_attn.q_proj.bfloat16()
    inputs = torch.randn(2, 50, 64).bfloat16()
    plain = linear(inputs)
    layer._current.append((torch.full((2, 1, 64), 1.003),))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = linear(inputs)
        assert found.dtype == torch.bfloat16 and torch.equal(found, (plain.float() * 1.003).bfloat16())
        assert not torch.equal(found, plain)

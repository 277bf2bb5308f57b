"""Prefixes, LLaMA-Adapter, MAM and UniPELT against attention written out; layer-wise settings and S4."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compress_peft.adapters import MAM, S4, Layers, LlamaAdapter, Lora, Parallel, PrefixTuning, UniPELT
from compress_peft.adapters.s4 import GROUPS, spindle
from compress_peft.errors import ConfigError, ModelError, UserError
from tests.adapters.helpers import padded, part_at, perturb, prompts
from tests.adapters.test_native import gpt2
from tests.conftest import build_tiny_llama

D, KEYS, HEADS, SIZE, BLOCKS = 64, 2, 4, 16, 2


def by_hand(attend):
    """Logits of the plain model with the attention of every block replaced by `attend(block, hidden, q, k, v, mask)`:
    q (b, heads, T, size), k and v repeated for the heads, mask (T, T) True to see -> (b, heads, T, size)."""
    model = build_tiny_llama()

    def forward(self, hidden_states, position_embeddings, **kwargs):
        split = [p(hidden_states).unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in (self.q_proj, self.k_proj)]
        query, key = apply_rotary_pos_emb(*split, *position_embeddings)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        key, value = (tensor.repeat_interleave(HEADS // KEYS, dim=1) for tensor in (key, value))
        mask = torch.ones(query.shape[2], query.shape[2]).tril().bool()
        output = attend(self.layer_idx, hidden_states, query, key, value, mask)
        return self.o_proj(output.transpose(1, 2).flatten(-2)), None

    for layer in model.model.layers:
        layer.self_attn.forward = forward.__get__(layer.self_attn)
    return model


def part(model, block):
    return part_at(model, f"model.layers.{block}.self_attn.o_proj")


def repeated(tensor):
    return tensor.repeat_interleave(HEADS // KEYS, dim=1)


@pytest.mark.parametrize("hidden", [0, 5])
def test_prefix_is_the_gated_attention_of_he_et_al(hidden):
    """(1 - l) Attn(q, K, V) + l Attn(q, P_k, P_v), l = sum exp(q P_k) / (sum exp(q P_k) + sum exp(q K))."""
    model = PrefixTuning(length=3, hidden=hidden).attach(build_tiny_llama())
    perturb(model, size=0.7)

    def attend(block, x, query, key, value, mask):
        mine = part(model, block)
        if hidden:
            made = torch.tanh(mine.network.embedding @ mine.network.weight + mine.network.bias)
            made = (made @ mine.weight + mine.bias).view(3, 2, KEYS, SIZE)
            prefix_key, prefix_value = (repeated(made[:, i].transpose(0, 1)[None]) for i in range(2))
        else:
            prefix_key, prefix_value = (repeated(half.transpose(0, 1)[None]) for half in mine.values)
        scores = ((query @ key.transpose(-1, -2)) / 4).masked_fill(~mask, -math.inf)
        own = query @ prefix_key.transpose(-1, -2) / 4
        share = own.exp().sum(-1) / (own.exp().sum(-1) + scores.exp().sum(-1))
        plain, prefix = scores.softmax(-1) @ value, own.softmax(-1) @ prefix_value
        return (1 - share[..., None]) * plain + share[..., None] * prefix

    expected = by_hand(attend)(prompts()).logits
    torch.testing.assert_close(model(prompts()).logits, expected, rtol=1e-4, atol=1e-4)
    networks = {id(part(model, block).network) for block in range(BLOCKS)}
    assert len(networks) == 1


def test_flat_prefix_is_that_of_hugging_face_peft():
    """GPT-2 has no rotary positions; with peft the text starts at the position after the prefix."""
    model = gpt2()
    theirs = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    torch.manual_seed(1)
    embedding = theirs.prompt_encoder["default"].embedding.weight
    embedding.data = torch.randn(embedding.shape)
    ours = PrefixTuning(length=3).attach(gpt2())
    values = embedding.data.view(3, BLOCKS, 2, 2, 16)  # tokens, blocks, key and value, heads, size
    for block in range(BLOCKS):
        mine = part_at(ours, f"transformer.h.{block}.attn.c_proj")
        mine.values.data = values[:, block].transpose(0, 1).contiguous()
    tokens = prompts() % 64
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) + 3
    expected = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    found = ours(input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_functions_and_padding(implementation):
    model = build_tiny_llama()
    model.set_attn_implementation(implementation)
    adapted = PrefixTuning(length=3).attach(model)
    perturb(adapted, size=0.7)
    tokens, mask = padded("left")
    together = adapted(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    reference = PrefixTuning(length=3).attach(build_tiny_llama())
    perturb(reference, size=0.7)
    for row in range(len(tokens)):
        own = tokens[row : row + 1, mask[row].bool()]
        expected = reference(input_ids=own).logits[0]
        torch.testing.assert_close(together[row, -own.shape[1] :], expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == implementation
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_attention_is_left_as_it_was_after_an_error():
    model = PrefixTuning(length=3).attach(build_tiny_llama())
    attention = model.get_base_model().model.layers[0].self_attn
    before = attention.config
    with pytest.raises(RuntimeError):
        attention(torch.zeros(1, 2, 5), position_embeddings=(torch.ones(1), torch.ones(1)))
    assert attention.config is before


def test_zero_init_attention():
    model = LlamaAdapter(length=3, layers=1).attach(build_tiny_llama())
    perturb(model, size=0.7)
    mine = part(model, 1)
    assert [type(module) for module in model.modules()].count(type(mine)) == 1
    attention = build_tiny_llama().model.layers[1].self_attn

    def attend(block, x, query, key, value, mask):
        output = ((query @ key.transpose(-1, -2)) / 4).masked_fill(~mask, -math.inf).softmax(-1) @ value
        if block == 0:
            return output
        keys, values = (repeated(p(mine.prompt).view(3, KEYS, SIZE).transpose(0, 1)[None]) for p in projections)
        weights = (query @ keys.transpose(-1, -2) / 4).softmax(-1)
        return output + torch.tanh(mine.gate)[:, None, None] * (weights @ values)

    projections = (attention.k_proj, attention.v_proj)
    torch.testing.assert_close(model(prompts()).logits, by_hand(attend)(prompts()).logits, rtol=1e-4, atol=1e-4)


def test_unipelt_by_its_formula():
    """Gates of each token: on the prefix's keys and values, on LoRA in place of its scale, on the adapter."""
    model = UniPELT(lora_r=2, adapter_r=4, length=3, hidden=0).attach(build_tiny_llama())
    perturb(model, size=0.4)
    base = by_hand(lambda *given: attend(*given))

    def attend(block, x, query, key, value, mask):
        mine = part(model, block)
        gate = torch.sigmoid(x @ mine.gate.weight + mine.gate.bias)[:, None, :, None]
        prefix_key, prefix_value = (repeated(half.transpose(0, 1)[None]) for half in mine.values)
        outputs = []
        for t in range(query.shape[2]):  # its own keys and values for each token
            keys = torch.cat([gate[:, :, t : t + 1] * prefix_key, key[:, :, : t + 1]], dim=2)
            values = torch.cat([gate[:, :, t : t + 1] * prefix_value, value[:, :, : t + 1]], dim=2)
            outputs.append((query[:, :, t : t + 1] @ keys.transpose(-1, -2) / 4).softmax(-1) @ values)
        return torch.cat(outputs, dim=2)

    for block, layer in enumerate(base.model.layers):
        lora = [part_at(model, f"model.layers.{block}.self_attn.{name}") for name in ("q_proj", "v_proj")]
        assert lora[0].gate is lora[1].gate
        for projection, mine in zip((layer.self_attn.q_proj, layer.self_attn.v_proj), lora, strict=True):

            def low_rank(module, args, y, mine=mine):
                gate = torch.sigmoid(args[0] @ mine.gate.weight + mine.gate.bias)[..., None]
                return y + gate * (args[0] @ mine.a.T @ mine.b.T)

            projection.register_forward_hook(low_rank)
        adapter = part_at(model, f"model.layers.{block}.mlp.down_proj")

        def bottleneck(module, args, y, mine=adapter):
            gate = torch.sigmoid(y @ mine.gate.weight + mine.gate.bias)[..., None]
            hidden = torch.relu(y @ mine.down.weight + mine.down.bias)
            return y + gate * (hidden @ mine.up.weight + mine.up.bias)

        layer.mlp.register_forward_hook(bottleneck)
    torch.testing.assert_close(model(prompts()).logits, base(prompts()).logits, rtol=1e-4, atol=1e-4)


def test_mam_is_prefix_and_parallel_adapter_together():
    model = MAM(r=4, length=3, hidden=5).attach(build_tiny_llama())
    perturb(model, size=0.3)
    both = model(prompts()).logits
    halves = {"prefix": PrefixTuning(length=3, hidden=5), "parallel": Parallel(r=4)}
    layers = {"0-": [{"method": "prefix_tuning", "length": 3, "hidden": 5}, {"method": "parallel", "r": 4}]}
    same = Layers(layers=layers).attach(build_tiny_llama())
    assert sum(p.numel() for p in same.parameters()) == sum(p.numel() for p in model.parameters())
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        for block in range(BLOCKS):
            key = f"model.layers.{block}.{name}"
            part_at(same, key).load_state_dict(part_at(model, key).state_dict())
    assert torch.equal(same(prompts()).logits, both)
    for adapter in halves.values():
        with torch.device("meta"):
            empty = build_tiny_llama()
        assert adapter.estimate_parameters(empty) < MAM(r=4, length=3, hidden=5).estimate_parameters(empty)


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (PrefixTuning(length=5), BLOCKS * 2 * 5 * KEYS * SIZE),
        (PrefixTuning(length=5, hidden=7), 5 * D + D * 7 + 7 + BLOCKS * 2 * KEYS * SIZE * (7 + 1)),
        (LlamaAdapter(length=5, layers=1), 5 * D + HEADS),
        (
            UniPELT(lora_r=2, adapter_r=4, length=5, hidden=0),
            BLOCKS * (2 * ((D + D) + (D + 32)) + 2 * 5 * KEYS * SIZE + 2 * D * 4 + 4 + D + 3 * (D + 1)),
        ),
        (
            Layers(
                layers={"0": {"method": "lora", "r": 3, "target_modules": ["q_proj"]}, "1-1": {"method": "pfeiffer"}}
            ),
            3 * (D + D) + 2 * D * 64 + 64 + D,
        ),
    ],
)
def test_parameter_counts_are_those_of_the_docstrings(adapter, count):
    assert adapter.parameter_counts(adapter.attach(build_tiny_llama()))["trainable"] == count
    with torch.device("meta"):
        empty = build_tiny_llama()
    assert adapter.estimate_parameters(empty) == count


def test_layers_of_lora_are_lora():
    """The same numbers in Hugging Face peft's LoRA and in ours give the same outputs, unmerged and merged."""
    theirs = Lora(r=4, lora_alpha=8).attach(build_tiny_llama())
    ours = Layers(layers={"0-": {"method": "lora", "r": 4, "lora_alpha": 8}}).attach(build_tiny_llama())
    perturb(theirs, size=0.2)
    for name, layer in theirs.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            mine = part_at(ours, name)
            mine.a.data, mine.b.data = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    found = ours(prompts()).logits
    torch.testing.assert_close(found, theirs(prompts()).logits)
    ours.merge_adapter()
    torch.testing.assert_close(ours(prompts()).logits, found)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(prompts()).logits, found)
    assert isinstance(ours.merge_and_unload(), LlamaForCausalLM)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({}, "at least one range"),
        ({"a": {"method": "lora"}}, "no range of blocks"),
        ({"0-2": {"method": "lora"}}, "blocks 0 to 1"),
        ({"1-0": {"method": "lora"}}, "lower number first"),
        ({"0": {"r": 4}}, "expected {method"),
        ({"0": {"method": "lora", "rnk": 4}}, "rnk"),
        ({"0": {"method": "lroa"}}, 'did you mean "lora"'),
        ({"0": {"method": "para"}}, "use one of: adamix, bitfit"),
        ({"0": {"method": "lora", "use_dora": True}}, "leave out use_dora"),
        ({"0": {"method": "llama_adapter", "layers": 1}}, "nothing in these blocks"),
    ],
)
def test_wrong_layers(layers, says):
    with pytest.raises((UserError, ValueError), match=says):
        Layers(layers=layers).attach(build_tiny_llama())


def test_spindle():
    assert spindle(6) == [0, 1, 1, 2, 2, 3]
    assert [spindle(30).count(group) for group in range(4)] == [5, 10, 10, 5]
    assert spindle(4) == [0, 1, 2, 3]
    for blocks in range(4, 40):
        assert set(spindle(blocks)) == {0, 1, 2, 3} and spindle(blocks) == sorted(spindle(blocks))


def test_s4_assigns_its_methods_and_the_same_budget():
    adapter = S4(share=0.1)
    model = build_tiny_llama(num_hidden_layers=6)
    budget = 0.1 * sum(p.numel() for p in model.parameters()) / 6
    adapted = adapter.attach(model)
    letters = {"low_rank": "L", "prefix": "P", "bottleneck": "A", "bias": "B"}
    for block, group in enumerate(spindle(6)):
        specs = [s for s in adapted.peft_config["default"].parts if s["module"].startswith(f"model.layers.{block}.")]
        assert {letters[spec["part"]] for spec in specs} == set(GROUPS[group])
        own = [p.numel() for n, p in adapted.named_parameters() if p.requires_grad and f"layers.{block}." in n]
        # whole ranks: at most one step of each method below the budget
        assert budget - (2 * (2 * D + 1) + 2 * (D + 32) + 2 * KEYS * SIZE) < sum(own) <= budget
    with pytest.raises(ConfigError, match="give a larger share"):
        S4(share=0.005).attach(build_tiny_llama(num_hidden_layers=4))


def test_attention_that_cannot_be_entered():
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(ModelError, match="BloomAttention computes its attention by itself"):
        PrefixTuning().attach(bloom)
    model = build_tiny_llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match='the attention implementation is "flex_attention"'):
        MAM().attach(model)
    with pytest.raises(ModelError, match="do not come from one linear layer each"):
        LlamaAdapter().attach(gpt2())

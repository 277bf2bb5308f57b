"""Folding PARA's mean vectors into the weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compress_peft.adapters import ADAPTERS
from compress_peft.errors import ConfigError, DataError
from compress_peft.merging import MERGERS, Static
from tests.adapters.helpers import CountVectors, adapted, padded, para_layers, prompts
from tests.conftest import build_tiny_llama


def batch(side="left", lengths=(4, 9, 6), seed=0):
    tokens, mask = padded(side, lengths, seed)
    return {"input_ids": tokens, "attention_mask": mask}


def constant(model):
    """The same vectors for every prompt: no down-projection, any bias."""
    for layer in para_layers(model):
        layer.para_down["default"].data.zero_()
    return model


def qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            parameter.data = torch.randn_like(parameter)  # they start at zero
    return model


@pytest.mark.parametrize("build", [build_tiny_llama, qwen2])
def test_constant_vectors_fold_exactly(build):
    bare = build()
    plain = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    expected_base = bare(prompts()).logits
    model = constant(adapted(bare))
    with torch.no_grad():
        expected = model(prompts()).logits
        merged = Static().merge(model, [batch()])
        torch.testing.assert_close(merged(prompts()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, expected_base, atol=0.1)
    assert type(merged) is type(bare) and not hasattr(merged, "peft_config")
    state = merged.state_dict()
    assert list(state) == list(plain)
    changed = {name.split(".", 3)[3] for name in state if not torch.equal(state[name], plain[name])}
    scaled = {"self_attn.q_proj.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"}
    assert changed == scaled | ({"self_attn.q_proj.bias", "self_attn.v_proj.bias"} if build is qwen2 else set())
    if build is qwen2:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_the_mean_is_that_of_the_vectors():
    model = adapted(build_tiny_llama())
    count = CountVectors(model)
    rows = []
    for row in range(3):
        tokens = prompts()[row : row + 1, : 4 + row]
        with torch.no_grad():
            model(tokens, prompt_end=torch.tensor([3 + row]))
        rows.append({index: vectors[0] for index, vectors in count.made[-2:]})
    batches = [{"input_ids": prompts()[row : row + 1, : 4 + row]} for row in range(3)]
    scales = model.base_model.mean_output_scales(batches)
    assert len(scales) == 6
    for block in (0, 1):
        mean = torch.stack([row[block] for row in rows]).mean(0)
        names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
        for name, part in zip(names, mean.split([64, 32, 128]), strict=True):
            torch.testing.assert_close(scales[f"model.layers.{block}.{name}"], part)
    assert rows[0][0].sub(rows[1][0]).abs().max() > 0.05  # the prompts do differ


def test_the_mean_depends_neither_on_batching_nor_on_padding():
    model = adapted(build_tiny_llama())
    lengths = (4, 9, 6, 5, 8)
    tokens, mask = padded("left", lengths)
    whole = model.base_model.mean_output_scales([{"input_ids": tokens, "attention_mask": mask}])
    singles = [{"input_ids": tokens[row, -length:][None]} for row, length in enumerate(lengths)]
    right = torch.zeros_like(tokens)
    right_mask = mask.flip(1)
    for row, length in enumerate(lengths):
        right[row, :length] = tokens[row, -length:]
    for batches in (
        singles,
        [{"input_ids": tokens[:3], "attention_mask": mask[:3]}, {"input_ids": tokens[3:], "attention_mask": mask[3:]}],
        [{"input_ids": right, "attention_mask": right_mask}],
        [{"input_ids": right, "prompt_end": torch.tensor(lengths) - 1}],
    ):
        other = model.base_model.mean_output_scales(batches)
        assert list(other) == list(whole)
        for name, scale in whole.items():
            torch.testing.assert_close(other[name], scale, msg=name)
    doubled = model.base_model.mean_output_scales([*singles, *singles])
    for name, scale in whole.items():
        torch.testing.assert_close(doubled[name], scale)
    fewer = model.base_model.mean_output_scales(singles[:2])
    assert any(not torch.allclose(fewer[name], scale, atol=1e-3) for name, scale in whole.items())


def test_batches_may_be_objects():
    tokens, mask = padded("left")
    end = torch.tensor([7, 5, 8])
    expected = Static().merge(
        adapted(build_tiny_llama()), [{"input_ids": tokens, "attention_mask": mask, "prompt_end": end}]
    )
    objects = [SimpleNamespace(input_ids=tokens, attention_mask=mask, prompt_end=end, targets=None)]
    found = Static().merge(adapted(build_tiny_llama()), iter(objects))
    default = Static().merge(adapted(build_tiny_llama()), [batch()])
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.allclose(default.state_dict()[name], expected.state_dict()[name], atol=1e-3)


def test_the_fold_uses_the_mean():
    bare = build_tiny_llama()
    weight = bare.model.layers[1].mlp.up_proj.weight.detach().clone()
    model = adapted(bare)
    scale = model.base_model.mean_output_scales([batch()])["model.layers.1.mlp.up_proj"]
    merged = Static().merge(model.train(), [batch()])
    assert torch.equal(merged.model.layers[1].mlp.up_proj.weight, weight * scale[:, None])
    assert merged.training  # the mode is left as it was


def test_shared_weights_are_not_corrupted():
    bare = build_tiny_llama()
    shared = bare.model.layers[0].mlp.gate_proj.weight
    bare.model.layers[0].mlp.up_proj.weight = shared
    before = shared.detach().clone()
    model = constant(adapted(bare))
    expected = model(prompts()).logits
    merged = Static().merge(model, [batch()])
    assert torch.equal(merged.model.layers[0].mlp.gate_proj.weight, before)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, before)
    torch.testing.assert_close(merged(prompts()).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_two_blocks_at_once_is_refused():
    bare = build_tiny_llama()
    bare.model.layers[1].mlp = bare.model.layers[0].mlp
    model = adapted(bare)
    with pytest.raises(ConfigError, match=r"the same layer as model.layers.0.mlp.up_proj"):
        Static().merge(model, [batch()])
    assert len(para_layers(model)) == 2


def test_weights_that_cannot_be_scaled_leave_the_model_unchanged():
    bare = build_tiny_llama()
    model = adapted(bare)
    layer = bare.model.layers[1].self_attn.v_proj
    expected = model(prompts()).logits
    float_weight = layer.weight
    merger, data = Static(), [batch()]
    scales = model.base_model.mean_output_scales(data)
    model.base_model.mean_output_scales = lambda batches: scales
    layer.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"model.layers.1.self_attn.v_proj: has a weight of Parameter, torch.uint8"):
        merger.merge(model, data)
    layer.weight = float_weight
    assert torch.equal(model(prompts()).logits, expected)


def test_refusals():
    model = adapted(build_tiny_llama())
    with pytest.raises(DataError, match="needs prompts"):
        Static().merge(model)
    with pytest.raises(DataError, match="there are no prompts"):
        Static().merge(model, [])
    with pytest.raises(ConfigError, match="has no adapter"):
        Static().merge(build_tiny_llama(), [batch()])
    for method in ("lora", "ia3"):
        other = ADAPTERS.create(method).attach(build_tiny_llama())
        with pytest.raises(ConfigError, match=f"{method.upper()} is none"):
            Static().merge(other, [batch()])
    assert isinstance(model.get_base_model(), LlamaForCausalLM) and len(para_layers(model)) == 2


def test_the_registry_says_what_a_policy_needs():
    facts = {name: (MERGERS[name].needs_calibration, MERGERS[name].exact) for name in MERGERS}
    exact = {name: (False, True) for name in ("auto", "bundle", "dense", "exact", "merge_aware")}
    assert facts == exact | {"requantize": (False, False), "sparse": (False, False), "static": (True, False)}
    for name in ADAPTERS:
        assert set(ADAPTERS[name].merge_policies) <= set(MERGERS)


def test_calibration_counts_positions_from_the_first_real_token():
    model = adapted(build_tiny_llama())
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["position_ids"])  # noqa: E731
    model.get_base_model().register_forward_pre_hook(hook, with_kwargs=True)
    model.base_model.mean_output_scales([batch(lengths=(2, 4))])
    assert seen[0].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]

"""Adapters on T5, and on a sample of the architectures of `python -m benchmarks.adapters --architectures`."""

from __future__ import annotations

import copy

import pytest
import torch

from compress_peft.adapters import ADAPTERS
from compress_peft.adapters.inside_attention import AttentionCall
from compress_peft.adapters.targets import sublayers
from compress_peft.errors import ModelError
from compress_peft.models.layers import decoder_layers, linear_layers
from compress_peft.quantization import QUANTIZERS
from compress_peft.quantization.apply import quantize_model
from compress_peft.weights.compressed import CompressedWeight
from tests.adapters.architectures import build_tiny
from tests.adapters.contract import LINES, SMALL, logits, outcome, portable
from tests.adapters.helpers import perturb, prompts
from tests.conftest import build_tiny_llama


def test_the_blocks_of_both_halves():
    names = [name for name, _ in decoder_layers(build_tiny("t5"))]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_the_sublayers_of_a_decoder_block():
    encoder, _, decoder, _ = sublayers(build_tiny("t5 v1.1"))
    root = "decoder.block.0.layer"
    assert encoder.attention_ends == ("encoder.block.0.layer.0.SelfAttention.o",) and encoder.cross_inputs == ()
    assert decoder.attention_ends == (f"{root}.0.SelfAttention.o", f"{root}.1.EncDecAttention.o")
    assert decoder.mlp_start == f"{root}.2.DenseReluDense.wi_0" and decoder.mlp_end == f"{root}.2.DenseReluDense.wo"
    assert decoder.inputs_like("q") == [f"{root}.0.SelfAttention.q"]
    assert decoder.inputs_like("q", cross=True)[1:] == [f"{root}.1.EncDecAttention.q"]
    assert len(decoder.all) == 4 + 4 + 3


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix_tuning", "unipelt"])
def test_the_contract_on_t5(method):
    settings = portable(SMALL.get(method, [{}])[0])
    for line in ("start", "learn", "reload", "checkpointing", "cache"):
        assert outcome(line, method, settings, "t5") == "pass", line


@pytest.mark.parametrize(
    ("method", "architecture"), [("ia3", "gpt2"), ("houlsby", "gpt_neox"), ("lora", "gpt2"), ("mam", "opt")]
)
def test_a_sample_of_architectures(method, architecture):
    for line in ("start", "learn"):
        assert outcome(line, method, SMALL.get(method, [{}])[0], architecture) == "pass", line


@pytest.mark.parametrize("method", ["para", "lst", "s4", "llama_adapter", "prompt_tuning", "adaptive_prefix_tuning"])
def test_what_t5_refuses(method):
    model = build_tiny("t5")
    before = logits(model)
    with pytest.raises(ModelError, match=r"encoder-decoder|not rotary"):
        ADAPTERS.create(method).attach(model)
    assert torch.equal(logits(model), before)


def test_transposed_weights_are_refused_where_the_method_computes_with_them():
    for method, settings in (
        ("qa_lora", {"group_size": 32}),
        ("l4q", {"group_size": 32}),
        ("merge_aware_lora", {}),
        ("lora", {"init": "pissa"}),
    ):
        with pytest.raises(ModelError, match=r"\(in, out\), such as transformer.h.0.attn.c_attn"):
            ADAPTERS.create(method, **settings).attach(build_tiny("gpt2"))


def test_cross_attention_tuning():
    model = build_tiny("t5")
    adapted = ADAPTERS.create("cross_attention_tuning").attach(model)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 and all(".EncDecAttention." in name for name in trained)
    assert sum(adapted.get_parameter(name).numel() for name in trained) == 2 * 4 * 64 * 64
    for line in LINES:
        assert outcome(line, "cross_attention_tuning", {}, "t5") == "pass", line
    with pytest.raises(ModelError, match="LlamaForCausalLM has no cross-attention"):
        ADAPTERS.create("cross_attention_tuning").attach(build_tiny_llama())


def test_a_prefix_is_further_keys_and_values_with_no_position():
    """Against attention written out: softmax over (q k^T + [0, position bias]), in every attention of T5."""
    model = build_tiny("t5")
    adapted = ADAPTERS.create("prefix_tuning", length=3).attach(model)
    perturb(adapted)
    adapted.eval()
    calls = []
    original = AttentionCall.with_prefix
    AttentionCall.with_prefix = lambda self, key, value: calls.append((self, key, value)) or original(self, key, value)
    try:
        found = {}
        for name, module in adapted.named_modules():
            if name.endswith(".o"):
                module.base_layer.register_forward_pre_hook(lambda _, args, at=name: found.setdefault(at, args[0]))
        logits(adapted, prompts(2, 5))
    finally:
        AttentionCall.with_prefix = original
    assert len(calls) == len(found) == 6
    for (call, key, value), (name, output) in zip(calls, found.items(), strict=True):
        scores = call.query @ torch.cat([key.expand(2, -1, -1, -1), call.key], dim=2).mT
        bias = call.others["position_bias"]
        scores = scores + torch.cat([bias.new_zeros(*bias.shape[:-1], 3), bias], dim=-1)
        if ".decoder." in name and "SelfAttention" in name:
            hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
            scores[..., 3:] = scores[..., 3:].masked_fill(hidden, float("-inf"))
        expected = scores.softmax(dim=-1) @ torch.cat([value.expand(2, -1, -1, -1), call.value], dim=2)
        torch.testing.assert_close(output, expected.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


def test_generation_says_what_was_learned():
    """A T5 that learns to repeat two prompts generates them, with its adapter in use and not without."""
    torch.manual_seed(0)
    adapted = ADAPTERS.create("lora", r=16).attach(build_tiny("t5")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    tokens, labels = prompts(2, 4), prompts(2, 3, seed=5)
    for _ in range(40):
        adapted(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    said = adapted.generate(input_ids=tokens, **settings)
    assert torch.equal(said[:, 1:], labels)
    with adapted.disable_adapter():
        assert not torch.equal(adapted.generate(input_ids=tokens, **settings)[:, 1:], labels)


@pytest.mark.parametrize("method", ["nf4", "gptq"])
def test_adapters_on_a_quantized_t5(method):
    """Both halves are quantized, with calibration too."""
    model = build_tiny("t5")
    more = {"group_size": None} if method == "gptq" else {}
    text = prompts(2, 8) if method == "gptq" else None
    quantize_model(model, QUANTIZERS.create(method, **more), text, progress=False)
    compressed = [name for name, layer in linear_layers(model) if isinstance(layer.weight, CompressedWeight)]
    assert len(compressed) == 2 * (4 + 2) + 2 * (8 + 2)
    for adapter in ("lora", "houlsby", "prefix_tuning"):
        adapted = ADAPTERS.create(adapter).attach(copy.deepcopy(model)).train()
        loss = adapted(input_ids=prompts(), labels=prompts()).loss
        loss.backward()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)

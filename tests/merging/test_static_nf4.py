"""PARA on a compressed backbone: attached, trained, folded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compress_peft.adapters import Para
from compress_peft.errors import ConfigError
from compress_peft.merging import Static
from compress_peft.models.save import save_model
from compress_peft.quantization.apply import quantize_model
from compress_peft.quantization.nf4 import NF4
from compress_peft.quantization.rtn import RTN
from compress_peft.weights.compressed import CompressedWeight
from tests.adapters.helpers import adapted, padded, para_layers, perturb, prompts
from tests.conftest import build_tiny_llama

QUANTIZERS = {
    "nf4": NF4(),
    "nf4_single": NF4(double_quant=False),
    "int4": RTN(),
    "int3": RTN(bits=3, group_size=None, symmetric=True),
    "int8": RTN(bits=8, scale_dtype="float32"),
}


def compressed_llama(quantizer, **overrides):
    model = build_tiny_llama(**overrides)
    quantize_model(model, quantizer, progress=False)
    return model


def nf4_llama(**overrides):
    return compressed_llama(NF4(), **overrides)


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_constant_vectors_fold_exactly_and_stay_compressed(quantizer, tmp_path):
    bare = compressed_llama(quantizer)
    layer = bare.model.layers[0].self_attn.v_proj
    codes, dense = layer.weight.components()["codes"].clone(), layer.weight.dequantize()
    model = adapted(bare)
    for wrapped in para_layers(model):
        wrapped.para_down["default"].data.zero_()
    tokens, mask = padded("left")
    with torch.no_grad():
        expected = model(prompts()).logits
        scale = model.base_model.mean_output_scales([{"input_ids": tokens, "attention_mask": mask}])
        merged = Static().merge(model, [{"input_ids": tokens, "attention_mask": mask}])
        torch.testing.assert_close(merged(prompts()).logits, expected, rtol=1e-4, atol=1e-4)
    folded = merged.model.layers[0].self_attn.v_proj
    assert isinstance(folded, nn.Linear) and isinstance(folded.weight, CompressedWeight)
    assert torch.equal(folded.weight.components()["codes"], codes)
    wanted = dense * scale["model.layers.0.self_attn.v_proj"][:, None]
    torch.testing.assert_close(folded.weight.dequantize(), wanted, rtol=1e-6, atol=0)
    again = AutoModelForCausalLM.from_pretrained(save_model(merged, tmp_path / "merged"))
    with torch.no_grad():
        assert torch.equal(again(prompts()).logits, merged(prompts()).logits)
    assert not any(parameter.requires_grad for parameter in merged.model.layers.parameters())


def test_blocks_across_rows_are_refused_and_nothing_changes():
    model = adapted(nf4_llama(hidden_size=96, num_attention_heads=6, num_key_value_heads=3))
    expected = model(prompts()).logits
    with pytest.raises(ConfigError, match="straddle") as error:
        Static().merge(model, [{"input_ids": prompts()}])
    assert len(error.value.problems) == 6
    assert torch.equal(model(prompts()).logits, expected)


def test_para_on_nf4():
    bare = nf4_llama()
    expected = bare(prompts()).logits
    model = Para().attach(bare)
    assert torch.equal(model(prompts()).logits, expected)
    perturb(model)
    tokens, mask = padded("left")
    for way in (dict(do_sample=False), dict(do_sample=False, num_beams=3)):
        settings = dict(attention_mask=mask, max_new_tokens=20, min_new_tokens=20, **way)
        cached = model.generate(input_ids=tokens, **settings)
        assert torch.equal(cached, model.generate(input_ids=tokens, use_cache=False, **settings))
    model.train()
    labels = prompts().clone()
    labels[:, :4] = -100
    model(prompts(), labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().max() > 0)) == ("para_" in name), name

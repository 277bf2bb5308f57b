"""The head and the embedding that is tied to it, as integer codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress_peft.errors import ModelError, UserError
from compress_peft.models.save import save_model
from compress_peft.quantization import QUANTIZERS
from compress_peft.quantization.apply import quantize_model
from compress_peft.quantization.head import quantize_head
from compress_peft.weights import CompressedWeight
from compress_peft.weights.inference import use_kernels
from eval.storage import measure_storage
from tests.conftest import build_tiny_llama

IDS = torch.tensor([[5, 9, 77, 0, 5], [1, 2, 3, 4, 127]])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_rounded_weights(tied: bool) -> None:
    model, reference = (build_tiny_llama(tie_word_embeddings=tied) for _ in range(2))
    facts = quantize_head(model, 8)
    weight = model.lm_head.weight
    assert isinstance(weight, CompressedWeight) and facts.tied == tied
    assert (model.model.embed_tokens.weight is weight) == tied
    assert 0 < facts.relative_error < 0.01 and facts.bytes_after < 0.3 * facts.bytes_before
    with torch.no_grad():
        reference.lm_head.weight.copy_(weight.dequantize())  # of a tied reference this changes the embedding too
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = build_tiny_llama(tie_word_embeddings=True)
    dense = measure_storage(model)
    quantize_model(model, QUANTIZERS.create("nf4"), progress=False)
    quantize_head(model, 4)
    after = measure_storage(model)
    assert after.embeddings == 0 and after.parameters == dense.parameters
    assert after.codes + after.scales == sum(
        w.storage_bytes for w in dict.fromkeys(p for p in model.parameters() if isinstance(p, CompressedWeight))
    )
    save_model(model, tmp_path / "model")
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) < after.memory_bytes + 20_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert isinstance(loaded.lm_head.weight, CompressedWeight)
    use_kernels(model)  # as a loaded one does
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_half_precision_and_compilation() -> None:
    model, reference = (build_tiny_llama(tie_word_embeddings=True) for _ in range(2))
    quantize_head(model, 8)
    with torch.no_grad():
        reference.lm_head.weight.copy_(model.lm_head.weight.dequantize())
        half, expected = (each.to(torch.bfloat16)(IDS).logits for each in (model, reference))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, expected, rtol=0.016, atol=0.004)  # two roundings of bfloat16
    embed = model.to(torch.float32).model.embed_tokens
    compiled = torch.compile(embed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IDS), embed(IDS))


def test_refusals() -> None:
    model = build_tiny_llama(tie_word_embeddings=True)
    quantize_head(model)
    with pytest.raises(ModelError, match="compressed already"):
        quantize_head(model)
    with pytest.raises(ModelError, match="no output head"):
        quantize_head(build_tiny_llama().model)
    nf4 = QUANTIZERS.create("nf4").quantize(torch.randn(128, 64))
    with pytest.raises(UserError, match="affine grid"):
        torch.nn.functional.embedding(IDS, nf4)
    with pytest.raises(UserError, match="max_norm"):
        torch.nn.functional.embedding(IDS, model.lm_head.weight, max_norm=1.0)

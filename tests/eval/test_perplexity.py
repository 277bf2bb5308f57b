from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from compress_peft.errors import DataError
from compress_peft.models.random_model import byte_tokenizer
from eval.perplexity import perplexity, text_blocks
from tests.conftest import build_tiny_llama

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "Pack my box with five dozen liquor jugs. " * 4]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_tiny_llama(vocab_size=259)


def test_blocks_join_documents_with_the_end_token() -> None:
    assert text_blocks(byte_tokenizer(), ["ab", "c", "d"], 2).tolist() == [
        [*byte_tokenizer()("ab").input_ids],
        [2, *byte_tokenizer()("c").input_ids],
        [2, *byte_tokenizer()("d").input_ids],
    ]
    assert text_blocks(byte_tokenizer(), ["ab", "c", "d"], 2, max_blocks=1).shape == (1, 2)


def test_equal_to_transformers_loss(model: LlamaForCausalLM) -> None:
    result = perplexity(model, byte_tokenizer(), TEXTS, block_size=64, progress=False)
    blocks = text_blocks(byte_tokenizer(), TEXTS, 64)
    with torch.no_grad():
        losses = [model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    assert result.block_nll == pytest.approx(losses, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result.tokens == len(blocks) * 63
    assert result.low < result.value < result.high


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_batch_size_changes_nothing(model: LlamaForCausalLM, batch_size: int) -> None:
    one = perplexity(model, byte_tokenizer(), TEXTS, block_size=32, batch_size=1, progress=False)
    many = perplexity(model, byte_tokenizer(), TEXTS, block_size=32, batch_size=batch_size, progress=False)
    assert many.block_nll == pytest.approx(one.block_nll, rel=1e-6)
    assert many.text_sha256 == one.text_sha256


def test_one_block_has_no_finite_interval(model: LlamaForCausalLM) -> None:
    result = perplexity(model, byte_tokenizer(), TEXTS, block_size=64, max_blocks=1, progress=False)
    assert (result.low, result.high) == (0.0, math.inf)


def test_logits_of_a_batch_never_stand_in_memory(model: LlamaForCausalLM) -> None:
    rows = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: rows.append(output.shape[:-1].numel()))
    perplexity(
        model,
        byte_tokenizer(),
        ["".join(map(str, range(1500)))],
        block_size=250,
        max_blocks=16,
        batch_size=16,
        progress=False,
    )
    assert max(rows) <= 256 and sum(rows) >= 16 * 249


def test_too_little_text_and_too_long_blocks(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="3 tokens, one block needs 64"):
        perplexity(model, byte_tokenizer(), ["ab"], block_size=64)
    with pytest.raises(DataError, match="256 positions"):
        perplexity(model, byte_tokenizer(), TEXTS, block_size=257)

"""A prompt-aware adapter is scored by what it knows when the prompt ends, never by the answer."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from compress_peft.adapters import Para
from compress_peft.data.examples import Example
from compress_peft.models.prompts import NO_PROMPT
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.quantization.apply import quantize_model
from compress_peft.quantization.nf4 import NF4
from eval.choices import score_choices
from eval.perplexity import perplexity, text_blocks
from tests.conftest import build_tiny_llama

PROMPTS = ["a", "some longer prompt", "mid size"]
CHOICES = (" yes", " no", " perhaps so")


@pytest.fixture(params=["dense", "nf4"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    backbone = build_tiny_llama(vocab_size=259)
    if request.param == "nf4":
        quantize_model(backbone, NF4(), progress=False)
    adapted = Para(r=4).attach(backbone)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


@torch.no_grad()
def full_sequence(model: PeftModel, prompt: str, choice: str, prompt_end: int | None = None) -> float:
    tokenizer = byte_tokenizer()
    head, tail = tokenizer(prompt).input_ids, tokenizer(choice).input_ids
    ids = torch.tensor([head + tail])
    end = torch.tensor([len(head) - 1 if prompt_end is None else prompt_end])
    logprobs = model(input_ids=ids, prompt_end=end).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(head) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_candidates_are_scored_with_the_prompts_vectors(model: PeftModel, batch_size: int) -> None:
    examples = [Example(prompt, CHOICES[0], CHOICES) for prompt in PROMPTS]
    scores = score_choices(model, byte_tokenizer(), examples, batch_size=batch_size, progress=False).loglikelihoods
    wanted = [[full_sequence(model, prompt, choice) for choice in CHOICES] for prompt in PROMPTS]
    torch.testing.assert_close(scores, torch.tensor(wanted), atol=1e-3, rtol=1e-4)
    leaking = full_sequence(model, PROMPTS[1], CHOICES[2], prompt_end=len(PROMPTS[1]) + len(CHOICES[2]) - 1)
    assert abs(leaking - wanted[1][2]) > 0.05  # the comparison above can tell the two apart


def test_perplexity_pools_nothing_of_the_text(model: PeftModel) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 3]
    result = perplexity(model, byte_tokenizer(), texts, block_size=32, batch_size=3, progress=False)
    losses = []
    for block in text_blocks(byte_tokenizer(), texts, 32):
        with torch.no_grad():
            logits = model(input_ids=block[None], prompt_end=torch.tensor([NO_PROMPT])).logits[0, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, block[1:])))
    assert result.block_nll == pytest.approx(losses, rel=1e-4)

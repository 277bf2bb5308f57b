"""Candidate scores against the plain full-sequence computation."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from compress_peft.data.examples import Example
from compress_peft.errors import DataError
from compress_peft.models.random_model import byte_tokenizer
from eval.choices import evaluate_choices, score_choices
from tests.conftest import build_tiny_llama

PROMPTS = ["a", "some longer prompt", "mid size", "an even longer prompt than that", "bb"]
LONG = (" yes", " no", " perhaps so")
SHORT = ("y", "n", "m")


def examples(choices: tuple[str, ...]) -> list[Example]:
    return [Example(prompt, choices[index % len(choices)], choices) for index, prompt in enumerate(PROMPTS)]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_tiny_llama(vocab_size=259)


@torch.no_grad()
def naive(model: LlamaForCausalLM, items: list[Example]) -> torch.Tensor:
    tokenizer = byte_tokenizer()
    rows = []
    for example in items:
        prompt = tokenizer(example.prompt).input_ids
        row = []
        for choice in example.choices:
            answer = tokenizer(choice).input_ids
            ids = torch.tensor([prompt + answer])
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            row.append(sum(logprobs[place, ids[0, place + 1]] for place in places))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("choices", [LONG, SHORT])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equal_to_full_sequences(model: LlamaForCausalLM, choices: tuple[str, ...], batch_size: int) -> None:
    items = examples(choices)
    scores = score_choices(model, byte_tokenizer(), items, batch_size=batch_size, progress=False)
    torch.testing.assert_close(scores.loglikelihoods, naive(model, items), atol=2e-4, rtol=1e-5)
    assert scores.lengths[0].tolist() == [len(choice) for choice in choices]


def test_examples_may_differ_in_their_candidates(model: LlamaForCausalLM) -> None:
    items = [Example("first", " a", (" a", " bb")), Example("the second one", "x", ("x", "y", "zzz"))]
    scores = score_choices(model, byte_tokenizer(), items, batch_size=2, progress=False)
    assert scores.loglikelihoods[0, 2] == -torch.inf
    alone = [score_choices(model, byte_tokenizer(), [item], progress=False).loglikelihoods[0] for item in items]
    torch.testing.assert_close(scores.loglikelihoods[0, :2], alone[0], atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores.loglikelihoods[1], alone[1], atol=2e-4, rtol=1e-5)


def test_one_token_candidates_need_one_pass(model: LlamaForCausalLM) -> None:
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    score_choices(model, byte_tokenizer(), examples(SHORT), batch_size=5, progress=False)
    assert len(calls) == 1


def test_scaled_logits_are_respected() -> None:
    """A model that changes its head's output must not be scored by the head alone."""

    class Scaled(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.25
            return output

    plain = build_tiny_llama(vocab_size=259)
    model = Scaled(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    items = examples(LONG)
    scores = score_choices(model, byte_tokenizer(), items, batch_size=3, progress=False)
    torch.testing.assert_close(scores.loglikelihoods, naive(model, items), atol=2e-4, rtol=1e-5)


def test_long_prompts_lose_their_start_for_all_candidates_alike(model: LlamaForCausalLM) -> None:
    long = Example("x" * 50 + "the end", " a", (" a", " abc"))
    cut = Example("the end", " a", (" a", " abc"))
    first = score_choices(model, byte_tokenizer(), [long], max_length=11, progress=False)
    second = score_choices(model, byte_tokenizer(), [cut], max_length=11, progress=False)
    torch.testing.assert_close(first.loglikelihoods, second.loglikelihoods)


def test_accuracy_counts_the_best_candidates(model: LlamaForCausalLM) -> None:
    items = examples(LONG)
    best = naive(model, items).argmax(-1)
    items = [
        Example(item.prompt, LONG[i] if n < 3 else LONG[(i + 1) % 3], LONG)
        for n, (item, i) in enumerate(zip(items, best.tolist(), strict=True))
    ]
    raw, per_token = evaluate_choices(model, byte_tokenizer(), items, progress=False)
    assert (raw.correct, raw.n, raw.value) == (3, 5, 0.6)
    assert raw.hits == (True, True, True, False, False)
    lengths = torch.tensor([len(choice) for choice in LONG])
    wanted = (naive(model, items) / lengths).argmax(-1).tolist()
    assert list(per_token.predictions) == [LONG[i] for i in wanted]


def test_training_mode_comes_back(model: LlamaForCausalLM) -> None:
    model.train()
    score_choices(model, byte_tokenizer(), examples(SHORT), progress=False)
    assert model.training


def test_unusable_examples_are_named(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match=r"examples\[1\]"):
        evaluate_choices(model, byte_tokenizer(), [Example("a", "b", ("b",)), Example("a", "c", ("b",))])
    with pytest.raises(DataError, match="no choices"):
        score_choices(model, byte_tokenizer(), [Example("a", "b")])
    with pytest.raises(DataError, match="none to score"):
        score_choices(model, byte_tokenizer(), [])

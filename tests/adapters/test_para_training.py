"""PARA in training and scoring: what the vectors may see, gradients, checkpointing."""

from __future__ import annotations

import pytest
import torch

from compress_peft.adapters import Para
from compress_peft.errors import DataError, ModelError
from compress_peft.models.prompts import NO_PROMPT, is_prompt_aware, prompt_kwargs
from tests.adapters.helpers import CountVectors, adapted, padded, para_layers, prompts
from tests.conftest import build_tiny_llama

PROMPT = 5
END = torch.full((3,), PROMPT - 1)


def labelled(tokens, prompt=PROMPT):
    labels = tokens.clone()
    labels[:, :prompt] = -100
    return labels


def vectors_of(model, *args, **kwargs):
    count = CountVectors(model)
    with torch.no_grad():
        logits = model(*args, **kwargs).logits
    made = torch.stack([vectors for _, vectors in count.made])
    for layer in para_layers(model):
        del layer.make_vectors  # the recording one
    return made, logits


@pytest.mark.parametrize("how", ["prompt_end", "labels", "no prompt"])
def test_the_answer_does_not_reach_the_vectors(tiny_llama, how):
    model = adapted(tiny_llama)
    tokens = prompts(3, 12)
    other = tokens.clone()
    other[:, PROMPT:] = prompts(3, 7, seed=8)
    keywords = {
        "prompt_end": lambda row: dict(prompt_end=END),
        "labels": lambda row: dict(labels=labelled(row)),
        "no prompt": lambda row: {},
    }[how]
    vectors, logits = vectors_of(model, tokens, **keywords(tokens))
    other_vectors, other_logits = vectors_of(model, other, **keywords(other))
    assert torch.equal(vectors, other_vectors)
    torch.testing.assert_close(logits[:, :PROMPT], other_logits[:, :PROMPT])
    changed = prompts(3, 12)
    changed[:, 0] = 3 + (changed[:, 0] - 2) % 125
    same = torch.equal(vectors, vectors_of(model, changed, **keywords(changed))[0])
    assert same == (how == "no prompt"), "the vectors must depend on the prompt, and on nothing where there is none"


def test_every_position_sees_only_what_is_before_it_without_a_prompt(tiny_llama):
    """Perplexity: no token reaches a position before its own."""
    model = adapted(tiny_llama)
    tokens = prompts(1, 10)
    with torch.no_grad():
        logits = model(tokens).logits
        for position in range(1, 10):
            other = tokens.clone()
            other[0, position] = 3 + (tokens[0, position] - 2) % 125
            torch.testing.assert_close(model(other).logits[:, :position], logits[:, :position])


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_the_prompt_ends(tiny_llama, side):
    model = adapted(tiny_llama)
    tokens, mask = padded(side, lengths=(4, 9, 6))
    first = torch.tensor([5, 0, 3]) if side == "left" else torch.zeros(3, dtype=torch.long)
    last = torch.tensor([8, 8, 8]) if side == "left" else torch.tensor([3, 8, 5])
    none = torch.full((3,), NO_PROMPT)
    labels = torch.full_like(tokens, -100)
    for row in range(3):
        labels[row, last[row] - 1 : last[row] + 1] = tokens[row, last[row] - 1 : last[row] + 1]
    all_labels = tokens.masked_fill(mask == 0, -100)  # as for perplexity
    rules = [
        (dict(labels=labels), last - 2),
        (dict(labels=all_labels), none),
        (dict(labels=torch.full_like(tokens, -100)), none),
        (dict(logits_to_keep=1), last),
        (dict(logits_to_keep=2), none),
        ({}, none),
        (dict(prompt_end=first + 1, labels=labels), first + 1),
        (dict(prompt_end=first + 1, logits_to_keep=1), first + 1),
    ]
    for keywords, expected in rules:
        found, _ = vectors_of(model, tokens, attention_mask=mask, **keywords)
        wanted, _ = vectors_of(model, tokens, attention_mask=mask, prompt_end=expected)
        assert torch.equal(found, wanted), keywords


def test_without_a_prompt_the_vectors_are_the_biases(tiny_llama):
    """Also for single rows of a batch, whatever the text; other rows are as if they stood alone."""
    model = adapted(tiny_llama)
    vectors, _ = vectors_of(model, prompts(3, 12), prompt_end=torch.tensor([NO_PROMPT, 4, NO_PROMPT]))
    for layer, made in zip(para_layers(model), vectors, strict=True):
        assert torch.equal(made[0], layer.para_bias["default"]) and torch.equal(made[2], made[0])
        assert not torch.equal(made[1], made[0])
    alone, _ = vectors_of(model, prompts(3, 12)[1:2], prompt_end=torch.tensor([4]))
    torch.testing.assert_close(vectors[:, 1:2], alone)


def test_prompt_end_is_checked(tiny_llama):
    model = adapted(tiny_llama)
    tokens, mask = padded("left", lengths=(4, 9, 6))
    wrong = {
        "row 0: 9": torch.tensor([9, 8, 8]),
        "row 2: -2": torch.tensor([8, 8, -2]),
        "row 0: 4": torch.tensor([4, 8, 8]),  # padding
        r"expected 3 integers, one a row; got shape \(2,\)": torch.tensor([8, 8]),
        "torch.float32": torch.tensor([8.0, 8.0, 8.0]),
    }
    for message, value in wrong.items():
        with pytest.raises(DataError, match=message):
            model(tokens, attention_mask=mask, prompt_end=value)
    four = torch.zeros(3, 1, 9, 9)
    with pytest.raises(DataError, match="expected a mask of shape"):
        model(tokens, attention_mask=four)


def test_blocks_that_get_no_prompt_end_say_so(tiny_llama):
    model = adapted(tiny_llama)
    with pytest.raises(ModelError, match="no prompt_end has arrived"):
        model.get_base_model().model(prompts(), use_cache=False)


def test_gradients_reach_only_the_adapter(tiny_llama):
    model = adapted(tiny_llama).train()
    model(prompts(3, 12), prompt_end=END, labels=labelled(prompts(3, 12))).loss.backward()
    for name, parameter in model.named_parameters():
        if "para_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name


def test_training_lowers_the_loss_from_the_initialization(tiny_llama):
    model = Para().attach(tiny_llama).train()
    tokens = prompts(3, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=labelled(tokens)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients(reentrant):
    def step(checkpointing):
        model = adapted(build_tiny_llama()).train()
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
        count = CountVectors(model)
        first = model(prompts(3, 12), prompt_end=END, labels=labelled(prompts(3, 12))).loss
        # a second forward before the backward: nothing of it may reach the recomputation of the first
        other = model(prompts(3, 8, seed=5), prompt_end=END - 2, labels=labelled(prompts(3, 8, seed=5), 3)).loss
        (first + 2 * other).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return (first.item(), other.item()), grads, len(count.made)

    losses, grads, runs = step(False)
    checkpointed_losses, checkpointed_grads, checkpointed_runs = step(True)
    assert losses == checkpointed_losses
    assert (runs, checkpointed_runs) == (4, 8)  # made once more by each recomputation, and not twice more
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed_grads[name], grad, msg=name)


def test_autocast_keeps_the_vectors_in_float32(tiny_llama):
    model = adapted(tiny_llama)
    embedding, tokens = model.get_base_model().get_input_embeddings(), prompts()
    layer = para_layers(model)[0]
    plain = layer.make_vectors(embedding(tokens), torch.tensor([1, 2, 3]), "default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.make_vectors(embedding(tokens), torch.tensor([1, 2, 3]), "default"), plain)


def test_prompt_kwargs(tiny_llama):
    assert prompt_kwargs(tiny_llama, END) == {} and not is_prompt_aware(tiny_llama)
    assert prompt_kwargs(Para().attach(tiny_llama), END) == {"prompt_end": END}

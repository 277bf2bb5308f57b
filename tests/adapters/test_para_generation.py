"""PARA under generate: with the cache as without it, one generator run a block and request."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from compress_peft.errors import ConfigError, DataError
from tests.adapters.helpers import CountVectors, adapted, padded, prompts
from tests.conftest import build_tiny_llama

NEW = 24
WAYS = {
    "greedy": dict(do_sample=False),
    "beam": dict(do_sample=False, num_beams=3),
    "beams returned": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "sampling": dict(do_sample=True, num_return_sequences=2),
}


def say(model, tokens, mask, seed=3, **settings):
    """The new tokens (rows, NEW); texts do not stop early."""
    torch.manual_seed(seed)
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0) | settings
    return model.generate(input_ids=tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]


def inputs(padding):
    return (prompts(), torch.ones(3, 9, dtype=torch.long)) if padding == "none" else padded(padding)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("way", WAYS)
def test_with_cache_as_without(tiny_llama, way, padding):
    model = adapted(tiny_llama)
    tokens, mask = inputs(padding)
    cached = say(model, tokens, mask, **WAYS[way])
    plain = say(model, tokens, mask, use_cache=False, **WAYS[way])
    assert torch.equal(cached, plain)
    with model.disable_adapter():
        assert not torch.equal(cached, say(model, tokens, mask, **WAYS[way]))


@pytest.mark.parametrize("way", ["greedy", "beam", "beams returned"])
def test_left_padded_rows_say_what_they_say_alone(tiny_llama, way):
    model = adapted(tiny_llama)
    tokens, mask = padded("left")
    together = say(model, tokens, mask, **WAYS[way])
    copies = together.shape[0] // tokens.shape[0]
    for row in range(3):
        real = mask[row].bool()
        alone = say(model, tokens[row, real][None], mask[row, real][None], **WAYS[way])
        assert torch.equal(together[row * copies : (row + 1) * copies], alone)


@pytest.mark.parametrize("way", WAYS)
def test_the_generator_runs_once_per_block_and_request(tiny_llama, way):
    model = adapted(tiny_llama)
    count = CountVectors(model)
    for request in range(1, 3):
        say(model, *padded("left"), **WAYS[way])
        assert count.blocks == [0, 1] * request


def test_the_vectors_of_a_request_are_those_of_its_prompts(tiny_llama):
    model = adapted(tiny_llama)
    count = CountVectors(model)
    lengths = (4, 9, 6)
    left, left_mask = padded("left", lengths)
    right, right_mask = torch.zeros_like(left), left_mask.flip(1)
    for row, length in enumerate(lengths):
        right[row, :length] = left[row, -length:]
    say(model, left, left_mask)
    say(model, right, right_mask)
    for row, length in enumerate(lengths):
        say(model, left[row : row + 1, -length:], torch.ones(1, length, dtype=torch.long))
    (left_0, left_1), (right_0, right_1) = ([vectors for _, vectors in count.made[i : i + 2]] for i in (0, 2))
    torch.testing.assert_close(right_0, left_0)
    torch.testing.assert_close(right_1, left_1)
    for row in range(3):
        torch.testing.assert_close(count.made[4 + 2 * row][1], left_0[row : row + 1])
        torch.testing.assert_close(count.made[5 + 2 * row][1], left_1[row : row + 1])


def test_requests_one_after_another_do_not_mix(tiny_llama):
    model = adapted(tiny_llama)
    requests = [padded("left", lengths=(4, 9)), padded("left", lengths=(7,), seed=1), padded("right", (3, 5, 2), 2)]
    first = [say(model, *request, do_sample=False) for request in requests]
    again = [say(model, *request, do_sample=False) for request in reversed(requests)]
    for a, b in zip(first, reversed(again), strict=True):
        assert torch.equal(a, b)


def test_static_cache(tiny_llama):
    model = adapted(tiny_llama)
    tokens, mask = padded("left")
    plain = say(model, tokens, mask, do_sample=False, use_cache=False)
    assert torch.equal(say(model, tokens, mask, do_sample=False, cache_implementation="static"), plain)
    cache = StaticCache(config=tiny_llama.config, max_cache_len=64)
    assert torch.equal(say(model, tokens, mask, do_sample=False, past_key_values=cache), plain)
    cache.reset()
    other, other_mask = padded("left", seed=5)
    reused = say(model, other, other_mask, do_sample=False, past_key_values=cache)
    assert torch.equal(reused, say(model, other, other_mask, do_sample=False, use_cache=False))


def test_padding_is_inferred_as_transformers_does(tiny_llama):
    model = adapted(tiny_llama)
    for side in ("left", "right"):
        tokens, mask = padded(side)
        inferred = model.generate(tokens, max_new_tokens=NEW, do_sample=False, use_cache=False)
        given = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(inferred, given)
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False)  # padding comes from the model's
        assert torch.equal(model.generate(tokens, generation_config=config), given)
        ends = dict(eos_token_id=[2, 0], max_new_tokens=NEW, do_sample=False)  # padding that ends texts is text
        all_real = model.generate(tokens, attention_mask=torch.ones_like(mask), **ends)
        assert torch.equal(model.generate(tokens, **ends), all_real)


def test_the_base_generate_of_a_cacheless_step_pools_the_prompt(tiny_llama):
    """The text of a request equals stepping by hand with an explicit prompt_end and no cache."""
    model = adapted(tiny_llama)
    tokens, mask = padded("left")
    said = say(model, tokens, mask, do_sample=False, eos_token_id=None)
    row, row_mask = tokens, mask
    end = torch.full((3,), tokens.shape[1] - 1)
    for step in range(NEW):
        positions = (row_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(row, attention_mask=row_mask, position_ids=positions, prompt_end=end, use_cache=False).logits
        assert torch.equal(logits[:, -1].argmax(-1), said[:, step])
        row = torch.cat([row, said[:, step : step + 1]], dim=1)
        row_mask = torch.cat([row_mask, torch.ones(3, 1, dtype=torch.long)], dim=1)


def test_an_explicit_prompt_end_pools_there(tiny_llama):
    model = adapted(tiny_llama)
    tokens, mask = inputs("none")
    end = torch.tensor([2, 5, 8])
    cached = say(model, tokens, mask, do_sample=False, prompt_end=end)
    assert torch.equal(cached, say(model, tokens, mask, do_sample=False, prompt_end=end, use_cache=False))
    default = say(model, tokens, mask, do_sample=False)
    assert not torch.equal(cached[:2], default[:2])
    assert torch.equal(cached[2], default[2])
    with pytest.raises(DataError, match="row 1: 9"):
        say(model, tokens, mask, prompt_end=torch.tensor([2, 9, 8]))


def filled_cache(model, tokens):
    cache = DynamicCache(config=model.get_base_model().config)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def test_copies_and_repeats_of_a_filled_cache(tiny_llama):
    model = adapted(tiny_llama)
    tokens, answers = prompts(2, 6), prompts(4, 3, seed=9)
    with torch.no_grad():
        whole = torch.cat([tokens.repeat_interleave(2, dim=0), answers], dim=1)
        expected = model(whole, prompt_end=torch.full((4,), 5)).logits[:, 6:]
        cache = copy.deepcopy(filled_cache(model, tokens))
        cache.batch_repeat_interleave(2)
        found = model(answers, past_key_values=cache).logits
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(model(whole).logits[:, 6:], expected, atol=1e-2)
        with pytest.raises(DataError, match="filled by 2 rows and is used by 3"):
            model(answers[:3], past_key_values=filled_cache(model, tokens))


def test_caches_without_layers_ahead_of_time(tiny_llama):
    model = adapted(tiny_llama)
    tokens = prompts(2, 6)
    cache = DynamicCache()
    assert len(cache.layers) == 0
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache, logits_to_keep=1)
        found = model(tokens[:, 5:], past_key_values=cache).logits
        expected = model(tokens, prompt_end=torch.tensor([4, 4])).logits[:, 5:]
    torch.testing.assert_close(found, expected)


def test_a_cache_of_another_adapter_is_refused(tiny_llama):
    model = adapted(tiny_llama)
    with torch.no_grad(), model.disable_adapter():
        cache = filled_cache(model, prompts(2, 6))
    with pytest.raises(DataError, match='without the vectors of the adapter "default"'):
        model(prompts(2, 1), past_key_values=cache)


def test_chunked_prompts_are_refused(tiny_llama):
    model = adapted(tiny_llama)
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(input_ids=prompts(), prefill_chunk_size=4)


def test_mixed_batches_are_refused(tiny_llama):
    model = adapted(tiny_llama)
    with pytest.raises(ConfigError, match="cannot mix adapters"):
        model(prompts(), adapter_names=["default"] * 3)


def test_generation_without_a_prompt(tiny_llama):
    model = adapted(tiny_llama)
    cached = model.generate(max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(max_new_tokens=8, do_sample=False, use_cache=False))


def test_prompt_lookup_decoding_says_the_same():
    model = adapted(build_tiny_llama())
    tokens = prompts(1, 5).repeat(1, 3)
    mask = torch.ones_like(tokens)
    greedy = say(model, tokens, mask, do_sample=False)
    assert torch.equal(say(model, tokens, mask, do_sample=False, prompt_lookup_num_tokens=3), greedy)


def test_embeddings_as_prompts(tiny_llama):
    model = adapted(tiny_llama)
    tokens, mask = padded("left")
    embedded = model.get_base_model().get_input_embeddings()(tokens)
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    found = model.generate(inputs_embeds=embedded, attention_mask=mask, **settings)
    assert torch.equal(found, say(model, tokens, mask, do_sample=False))


def test_nothing_of_a_request_stays_behind(tiny_llama):
    model = adapted(tiny_llama)
    tokens = prompts(2, 7, seed=4)
    before = model(tokens).logits
    say(model, *padded("left"), do_sample=False)
    assert torch.equal(model(tokens).logits, before)
    with pytest.raises(DataError):
        say(model, *padded("left"), prompt_end=torch.tensor([0, 0, 0]))
    assert torch.equal(model(tokens).logits, before)

"""Prompts that beams share: the same texts, each prompt processed once."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache

from compress_peft.adapters import ADAPTERS
from compress_peft.loading import load
from compress_peft.models.faster_generate import faster_generate
from compress_peft.models.random_model import byte_tokenizer
from tests.adapters.helpers import padded, perturb, prompts
from tests.conftest import build_tiny_llama

WAYS = {
    "greedy": dict(do_sample=False),
    "beam": dict(do_sample=False, num_beams=3),
    "beams returned": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "sampling": dict(do_sample=True, num_return_sequences=2),
}
NEW = 12


def say(model, tokens, mask, **settings):
    torch.manual_seed(3)
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0) | settings
    return model.generate(input_ids=tokens, attention_mask=mask, **settings)


def adapted(method):
    if method == "none":
        return build_tiny_llama()
    if method in ("prefix", "prompt"):
        kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
        model = get_peft_model(build_tiny_llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
        perturb(model, 0, 0.3)
        return model.eval()
    model = ADAPTERS.create(method).attach(build_tiny_llama())
    perturb(model, 0, 0.3)
    return model.eval()


@pytest.fixture
def passes(monkeypatch):
    """(rows, tokens) of every pass through the first block."""
    found = []

    def watch(model):
        block = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
        block.register_forward_pre_hook(lambda _, args: found.append(tuple(args[0].shape[:2])))
        return model

    return found, watch


@pytest.mark.parametrize("method", ["none", "lora", "para", "ia3", "prefix", "prompt"])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_texts(way, method, passes):
    found, watch = passes
    model = watch(adapted(method))
    tokens, mask = padded("left")
    plain = say(model, tokens, mask, **WAYS[way])
    first = found[0]
    found.clear()
    faster_generate(model.get_base_model() if method != "none" else model)
    assert torch.equal(say(model, tokens, mask, **WAYS[way]), plain)
    repeats = max(WAYS[way].get("num_beams", 1), WAYS[way].get("num_return_sequences", 1))
    assert first[0] == 3 * repeats and found[0] == (3, first[1])
    assert all(shape == (3 * repeats, 1) for shape in found[1:])


@pytest.mark.parametrize(
    "settings",
    [{"use_cache": False}, {"output_hidden_states": True}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["no cache", "hidden states", "static cache"],
)
def test_what_cannot_be_repeated_stays(settings, passes):
    found, watch = passes
    model = watch(build_tiny_llama())
    tokens, mask = padded("left")
    options = {"num_beams": 3, "do_sample": False, "return_dict_in_generate": True, **settings}
    plain = say(model, tokens, mask, **options).sequences
    found.clear()
    faster_generate(model)
    assert torch.equal(say(model, tokens, mask, **options).sequences, plain)
    assert found[0][0] == 9


def test_a_cache_that_is_filled_goes_on(passes):
    model = build_tiny_llama()
    tokens, mask = prompts(), torch.ones(3, 9, dtype=torch.long)
    plain = say(model, tokens, mask, num_beams=3, do_sample=False)
    faster_generate(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens[:, :5], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert torch.equal(say(model, tokens, mask, num_beams=3, do_sample=False, past_key_values=cache), plain)


def test_models_that_are_loaded_share(tmp_path, passes):
    found, watch = passes
    model = build_tiny_llama(vocab_size=300)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = watch(load(tmp_path)[0])
    tokens, mask = padded("left")
    want = say(model, tokens, mask, num_beams=3, do_sample=False)
    assert torch.equal(say(loaded, tokens, mask, num_beams=3, do_sample=False), want)
    assert found[0][0] == 3
    other = copy.deepcopy(loaded)
    assert other._prefill.__self__ is other

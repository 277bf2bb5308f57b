"""Encoder-decoders: rows split into both halves, and losses, scores and answers as transformers itself gives them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from compress_peft.adapters import ADAPTERS, adamix
from compress_peft.data.encode import encode_example
from compress_peft.data.examples import Example
from compress_peft.errors import ModelError
from compress_peft.export.base import logit_gap
from compress_peft.loading import load
from compress_peft.merging.compare import sample_logits
from compress_peft.models.empty import empty_model, match_folder
from compress_peft.models.encoder_decoder import align_right, split_rows, start_token
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.save import save_model
from compress_peft.quantization import QUANTIZERS, quantize_folder, quantize_model
from compress_peft.quantization.head import quantize_head
from compress_peft.training import TrainingSettings, train
from compress_peft.training.batches import IGNORED, collate, encode_all
from compress_peft.training.hooks import PreparationBatches
from compress_peft.training.losses import language_modelling_loss, language_modelling_losses
from compress_peft.weights.compressed import CompressedWeight
from eval.answer_loss import answer_loss
from eval.choices import score_choices
from eval.generation import generate_answers
from eval.latency import decode
from eval.memory import BlockWidths, kv_cache_bytes
from tests.adapters.architectures import T5, USUAL
from tests.training.helpers import response_logits


def closing_tokenizer() -> Any:
    """Closes every text by the end-of-text token, as T5's does."""
    tokenizer = byte_tokenizer()
    ending = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ending
    return tokenizer


TOKENIZER = closing_tokenizer()
EXAMPLES = [
    Example("ab?", " yes", (" yes", " no", " perhaps")),
    Example("what of a longer prompt?", " no", (" yes", " no", " perhaps")),
    Example("c", " perhaps", (" yes", " no", " perhaps")),
]
PAIRS = [([5, 6, 7], [8, 2]), ([9, 10], [11, 12, 13, 2]), ([14, 15, 16, 17], [2])]


def build_t5(**changes: Any) -> Any:
    sizes = USUAL | T5 | {"vocab_size": 320} | changes
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**sizes)).eval()


@pytest.fixture(scope="module")
def t5() -> Any:
    return build_t5()


@pytest.fixture(scope="module")
def untied_t5() -> Any:
    """With a head of its own; a random model whose head is its embedding says its start token again and again."""
    model = build_t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    model.lm_head.weight = nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    return model


@pytest.fixture(scope="module")
def bart() -> Any:
    """Its positions are absolute: padding at the start would move them."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3, "max_position_embeddings": 64}
    tokens = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **tokens, forced_eos_token_id=None)).eval()


def naive(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """The loss that transformers gives one example by itself, summed over its tokens."""
    loss: Tensor = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([response])).loss
    return loss * len(response)


def test_rows_are_split_into_both_halves(t5):
    batch = collate(PAIRS, 0)
    halves = split_rows(t5, batch.input_ids, batch.attention_mask, batch.prompt_end)
    assert halves["input_ids"].tolist() == [[5, 6, 7, 0], [9, 10, 0, 0], [14, 15, 16, 17]]
    assert halves["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert halves["decoder_input_ids"].tolist() == [[0, 8, 2, 0, 0], [0, 11, 12, 13, 2], [0, 2, 0, 0, 0]]
    assert halves["decoder_attention_mask"].sum(dim=1).tolist() == [3, 5, 2]
    right = align_right(halves["decoder_input_ids"][..., None], halves["decoder_attention_mask"])[..., 0]
    assert right[0, -3:].tolist() == [0, 8, 2] and right[2, -2:].tolist() == [0, 2]
    alone = split_rows(t5, torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]), torch.tensor([2]))
    assert alone["input_ids"].tolist() == [[5, 6]] and alone["decoder_input_ids"].tolist() == [[0]]


def test_a_decoder_without_a_start_token_is_refused(t5, monkeypatch):
    monkeypatch.setattr(t5.config, "decoder_start_token_id", None)
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        start_token(t5)


def test_the_prompt_of_an_encoder_stays_closed():
    opened, response = encode_example(TOKENIZER, "abc", "d", max_length=9, eos=True)
    closed, same = encode_example(TOKENIZER, "abc", "d", max_length=9, eos=True, apart=True)
    assert closed == [*opened, 2] and same == response and len(opened) == 3 and response[-1] == 2
    cut, _ = encode_example(TOKENIZER, "abcdef", "d", max_length=5, eos=True, apart=True)
    assert len(cut) == 3 and cut[-1] == 2


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_that_of_transformers(kind, request):
    model = request.getfixturevalue(kind)
    wanted = torch.stack([naive(model, *pair) for pair in PAIRS])
    batch = collate(PAIRS, 0)
    torch.testing.assert_close(language_modelling_losses(model, batch), wanted)
    torch.testing.assert_close(language_modelling_loss(model, batch), wanted.sum())
    logprobs = response_logits(model, batch).log_softmax(-1)
    real = batch.targets != IGNORED
    picked = logprobs[real].gather(1, batch.targets[real][:, None])
    torch.testing.assert_close(-picked.sum(), wanted.sum())


@pytest.mark.parametrize("kind", ["t5", "untied_t5", "bart"])
def test_choices_are_scored_as_transformers_scores_them(kind, request):
    model = request.getfixturevalue(kind)
    wanted = [
        [
            -naive(model, *encode_example(TOKENIZER, item.prompt, choice, max_length=99, eos=False, apart=True))
            for choice in item.choices
        ]
        for item in EXAMPLES
    ]
    for batch_size in (1, 2, 3):
        found = score_choices(model, TOKENIZER, EXAMPLES, batch_size=batch_size, progress=False)
        torch.testing.assert_close(found.loglikelihoods, torch.tensor(wanted), rtol=1e-4, atol=1e-4)
        assert found.lengths.tolist() == [[4, 3, 8]] * 3


def test_choices_with_an_adapter(t5):
    adapted = ADAPTERS.create("lora", r=2, init="gaussian").attach(copy.deepcopy(t5))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    prompt, response = encode_example(TOKENIZER, "ab?", " yes", max_length=99, eos=False, apart=True)
    wanted = -naive(adapted, prompt, response)
    assert not torch.isclose(wanted, -naive(t5, prompt, response))
    found = score_choices(adapted, TOKENIZER, EXAMPLES, progress=False).loglikelihoods[0, 0]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["untied_t5", "bart"])
def test_answers_are_those_of_plain_greedy_decoding(kind, request):
    """Without a cache, without padding, one by one."""
    model = request.getfixturevalue(kind)
    wanted = []
    for example in EXAMPLES:
        read = torch.tensor([TOKENIZER(example.prompt).input_ids])
        said = [start_token(model)]
        while len(said) < 7 and (len(said) == 1 or said[-1] != 2):
            logits = model(input_ids=read, decoder_input_ids=torch.tensor([said]), use_cache=False).logits[0, -1]
            said.append(int(logits.argmax()))
        wanted.append(TOKENIZER.decode(said[1:], skip_special_tokens=True))
    for batch_size in (1, 3):
        found = generate_answers(
            model, TOKENIZER, EXAMPLES, max_new_tokens=6, batch_size=batch_size, max_length=99, progress=False
        )
        assert found == wanted
    assert any(wanted)


def test_the_answer_loss_and_its_interval(t5):
    pairs = encode_all(TOKENIZER, EXAMPLES, 99, eos=True, apart=True)
    losses = torch.stack([naive(t5, *pair) for pair in pairs]).double()
    counts = torch.tensor([len(response) for _, response in pairs]).double()
    value = float(losses.sum() / counts.sum())
    spread = float((losses - value * counts).var() / 3) ** 0.5 / float(counts.mean())
    for batch_size in (1, 3):
        found = answer_loss(t5, TOKENIZER, EXAMPLES, batch_size=batch_size, max_length=99, progress=False)
        assert found.value == pytest.approx(value, rel=1e-5) and (found.tokens, found.examples) == (18, 3)
        assert found.high - found.value == pytest.approx(4.302653 * spread, rel=1e-4)  # t of 2 degrees of freedom


def test_training_lowers_the_answer_loss(t5, tmp_path):
    """Its validation loss is the answer loss of the same examples."""
    adapted = ADAPTERS.create("lora").attach(copy.deepcopy(t5))
    before = answer_loss(adapted, TOKENIZER, EXAMPLES, max_length=99, progress=False)
    settings = TrainingSettings(max_steps=6, batch_size=3, learning_rate=3e-2, eval_steps=6, patience=None)
    arguments = {"max_length": 99, "seed": 0, "checkpoints": tmp_path}
    progress = train(adapted, TOKENIZER, EXAMPLES, EXAMPLES, settings, **arguments).progress
    after = answer_loss(adapted, TOKENIZER, EXAMPLES, max_length=99, progress=False)
    assert progress.losses[0]["loss"] == pytest.approx(before.value, rel=1e-5)  # one batch, and LoRA starts as nothing
    assert progress.validations[-1]["loss"] == pytest.approx(after.value, rel=1e-5)
    assert after.value < before.value - 0.1


def test_the_logits_that_a_merge_compares_are_the_responses(t5):
    first, second = (sample_logits(t5, [collate(pairs, 0)]) for pairs in (PAIRS, PAIRS[1:2]))
    assert first[0].shape == (3 + 5 + 2, 320)
    torch.testing.assert_close(first[0][3:8], second[0], rtol=1e-4, atol=1e-5)
    wanted = functional.log_softmax(second[0], -1)[torch.arange(4), torch.tensor(PAIRS[1][1])].sum()
    torch.testing.assert_close(-wanted, naive(t5, *PAIRS[1]))


def test_adamix_compares_the_response_tokens_of_both_passes(t5, monkeypatch):
    method = ADAPTERS.create("adamix", consistency=1.0)
    adapted = method.attach(copy.deepcopy(t5)).eval()  # one expert in evaluation: both passes agree
    batch = collate(PAIRS, 0)
    compared: list[Tensor] = []
    monkeypatch.setattr(adamix, "symmetric_divergence", lambda *both: compared.extend(both) or torch.zeros(1))
    loss = method.training_loss(adapted, batch, language_modelling_loss)
    torch.testing.assert_close(loss, language_modelling_loss(adapted, batch))
    wanted = response_logits(adapted, batch)[batch.targets != IGNORED]
    assert len(compared) == 2
    for logits in compared:
        torch.testing.assert_close(logits, wanted)


def test_eva_looks_at_the_inputs_of_both_halves(t5):
    """Against X^T X of one example, layer by layer."""
    method = ADAPTERS.create("lora", r=2, init="eva", eva_batches=1)
    adapted = method.attach(copy.deepcopy(t5))
    start = PreparationBatches(PAIRS[:1], TOKENIZER, 2, 0, language_modelling_loss, torch.device("cpu"))
    method.prepare_training(adapted, start, 1)
    layer = adapted.get_submodule("base_model.model.decoder.block.1.layer.1.EncDecAttention.k")
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        t5_inputs = torch.tensor([PAIRS[0][0]]), torch.tensor([PAIRS[0][1]])
        adapted(input_ids=t5_inputs[0], labels=t5_inputs[1])
    handle.remove()
    a = layer.lora_A["default"].weight
    directions = torch.linalg.svd(seen[0][0])[2][:2]
    torch.testing.assert_close((a @ directions.T).abs(), torch.eye(2), rtol=1e-3, atol=1e-3)


def test_a_quantized_head_stays_tied_to_all_embeddings(t5):
    model = copy.deepcopy(t5)
    before = language_modelling_loss(model, collate(PAIRS, 0))
    assert quantize_head(model, 8).tied
    weights = [model.shared.weight, model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight]
    assert isinstance(model.lm_head.weight, CompressedWeight)
    assert all(weight is model.lm_head.weight for weight in weights)
    torch.testing.assert_close(language_modelling_loss(model, collate(PAIRS, 0)), before, rtol=0.02, atol=0.02)


def test_the_profile_decodes_through_both_caches(t5):
    prompt = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    run = decode(t5, prompt, 5)
    expected = 2 * 2 * (9 + 5) * 2 * 64 * 4  # keys and values, rows, cross and self, blocks, width, bytes
    assert run.cache_bytes == expected == kv_cache_bytes(t5.config, 2, 14, 4)
    assert BlockWidths.of(t5).blocks == 4 and BlockWidths.of(t5).attention == 64


def test_a_head_of_its_own_is_kept_where_the_class_would_tie_it(untied_t5, tmp_path):
    """T5 v1.1, mT5 and FLAN-T5 have one, and transformers' class ties it to the embedding unless the files differ."""
    batch = collate(PAIRS, 0)
    folder = save_model(copy.deepcopy(untied_t5), tmp_path / "dense", TOKENIZER)
    loaded, _ = load(folder)
    assert loaded.lm_head.weight is not loaded.shared.weight
    assert torch.equal(language_modelling_loss(loaded, batch), language_modelling_loss(untied_t5, batch))
    assert not quantize_head(loaded, 8).tied
    again, _ = load(save_model(loaded, tmp_path / "head", TOKENIZER))
    assert isinstance(again.lm_head.weight, CompressedWeight) and not isinstance(again.shared.weight, CompressedWeight)
    assert torch.equal(language_modelling_loss(again, batch), language_modelling_loss(loaded, batch))
    with pytest.raises(ModelError, match="weights of its own for it"):  # block by block they would be lost
        match_folder(empty_model(folder, torch.float32), folder)


def test_block_by_block_both_halves_come_out_the_same(t5, tmp_path):
    folder = save_model(copy.deepcopy(t5), tmp_path / "dense", TOKENIZER)
    model = copy.deepcopy(t5)
    method = QUANTIZERS.create("rtn", bits=4, group_size=32)
    quantize_model(model, method, progress=False)
    quantize_folder(
        folder, tmp_path / "out", method, None, dtype=torch.float32, tokenizer=TOKENIZER, work=tmp_path / "work"
    )
    loaded, _ = load(tmp_path / "out")
    batch = collate(PAIRS, 0)
    assert torch.equal(language_modelling_loss(loaded, batch), language_modelling_loss(model, batch))
    assert logit_gap(loaded, model) == 0 < logit_gap(model, t5)

"""The loop learns, keeps the best, stops early, weighs tokens equally, and resumes to the same result."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from compress_peft.data.examples import Example
from compress_peft.errors import CorruptFile, ModelError
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.training import TrainingSettings, train
from compress_peft.training.batches import IGNORED, collate, encode_all
from compress_peft.training.checkpoint import trainable
from compress_peft.training.loop import _group, validation_loss
from compress_peft.training.losses import language_modelling_loss
from tests.conftest import build_tiny_llama

TOKENIZER = byte_tokenizer()
WORDS = {"red": " a", "green": " b", "blue": " c", "white": " d"}
EXAMPLES = tuple(Example(f"{word} {'x' * (i % 5)} ->", answer) for i in range(8) for word, answer in WORDS.items())


def adapted(dropout: float = 0.1, seed: int = 0):
    model = build_tiny_llama(seed=seed, vocab_size=300)
    torch.manual_seed(7)
    return get_peft_model(
        model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def run(model, folder: Path, **settings):
    values = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "eval_steps": 4, "patience": None, **settings}
    return train(
        model,
        TOKENIZER,
        EXAMPLES[:24],
        EXAMPLES[24:],
        TrainingSettings(**values),
        max_length=64,
        seed=3,
        checkpoints=folder,
    )


def test_it_learns_and_changes_only_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    result = run(model, tmp_path, max_steps=30)
    losses = [entry["loss"] for entry in result.progress.losses]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert result.trainable_parameters == sum(p.numel() for p in trainable(model).values())


def test_the_weights_of_the_best_validation_are_kept(tmp_path: Path) -> None:
    model = adapted(dropout=0.0)
    result = run(model, tmp_path, max_steps=3, learning_rate=0.3, schedule="constant", eval_steps=1)
    pairs = encode_all(TOKENIZER, EXAMPLES[24:], 64, True)
    losses = [entry["loss"] for entry in result.progress.validations]
    assert min(losses) < losses[-1], "the test needs a run that gets worse at the end"
    assert validation_loss(model, TOKENIZER, pairs, 16) == pytest.approx(min(losses), rel=1e-5)
    assert result.progress.best_step == losses.index(min(losses)) + 1


def test_early_stopping_counts_evaluations_without_gain(tmp_path: Path) -> None:
    result = run(adapted(), tmp_path, max_steps=40, learning_rate=3.0, schedule="constant", eval_steps=1, patience=3)
    assert result.stopped_early
    assert result.progress.step == result.progress.best_step + 3


@pytest.mark.parametrize("killed_at", [3, 4, 10])
def test_resuming_gives_the_same_weights_bit_for_bit(tmp_path: Path, killed_at: int) -> None:
    """Dropout, moments, schedule, data order and the best weights all come back."""
    whole = adapted()
    expected = run(whole, tmp_path / "whole", checkpoint_steps=3)

    class Killed(Exception):
        pass

    calls = 0

    def fragile_loss(model, batch):
        nonlocal calls
        calls += model.training
        if calls > killed_at:
            raise Killed
        return language_modelling_loss(model, batch)

    arguments = dict(max_length=64, seed=3, checkpoints=tmp_path / "cut")
    settings = TrainingSettings(
        max_steps=12, batch_size=8, learning_rate=1e-2, eval_steps=4, patience=None, checkpoint_steps=3
    )
    with pytest.raises(Killed):
        train(adapted(), TOKENIZER, EXAMPLES[:24], EXAMPLES[24:], settings, loss=fragile_loss, **arguments)
    resumed = adapted()
    torch.manual_seed(12345)  # a new process has another random state
    result = train(resumed, TOKENIZER, EXAMPLES[:24], EXAMPLES[24:], settings, **arguments)
    assert result.resumed_from == killed_at // 3 * 3
    assert [e["loss"] for e in result.progress.losses] == [e["loss"] for e in expected.progress.losses]
    for name, parameter in trainable(whole).items():
        assert torch.equal(parameter, trainable(resumed)[name]), name


def test_rows_that_belong_together_come_together_and_all_of_them_in_an_epoch() -> None:
    rows = [([3, problem], [task]) for problem in range(10, 19) for task in (1, 2, 3)]
    settings = TrainingSettings(batch_size=6)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(5):  # of 27 rows
            for batch in _group(rows, TOKENIZER, settings, 3, 5 * epoch + step, 3):
                firsts = batch.input_ids[:, 1].view(-1, 3)
                assert (firsts == firsts[:, :1]).all() and batch.targets.view(-1, 3).tolist() == [[1, 2, 3]] * len(
                    firsts
                )
                seen += firsts[:, 0].tolist()
        orders.append(seen)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10, 19)) and orders[0] != orders[1]


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Also where the batches have different numbers of response tokens."""
    large, small = adapted(dropout=0.0), adapted(dropout=0.0)
    longer = tuple(Example(e.prompt, e.response + "!" * (i % 3)) for i, e in enumerate(EXAMPLES))
    for model, size, accumulation in ((large, 8, 1), (small, 2, 4)):
        settings = TrainingSettings(max_steps=3, batch_size=size, gradient_accumulation=accumulation, eval_steps=3)
        train(model, TOKENIZER, longer, longer, settings, max_length=64, seed=0, checkpoints=tmp_path / str(size))
    for name, parameter in trainable(large).items():
        torch.testing.assert_close(parameter, trainable(small)[name], atol=1e-5, rtol=1e-3)


def test_gradient_checkpointing_gives_the_same_training(tmp_path: Path) -> None:
    plain, checkpointed = adapted(dropout=0.0), adapted(dropout=0.0)
    run(plain, tmp_path / "plain", max_steps=3)
    run(checkpointed, tmp_path / "checkpointed", max_steps=3, gradient_checkpointing=True)
    for name, parameter in trainable(plain).items():
        torch.testing.assert_close(parameter, trainable(checkpointed)[name], atol=1e-6, rtol=1e-4)


def test_loss_is_on_the_response_alone_and_equals_the_full_computation() -> None:
    model = adapted(dropout=0.0).eval()
    pairs = encode_all(TOKENIZER, [Example("ab", " cd"), Example("longer prompt", " e")], 64, True)
    batch = collate(pairs, 0)
    full = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits.log_softmax(-1)
    expected = 0.0
    for row, (_, response) in enumerate(pairs):
        start = batch.input_ids.shape[1] - len(response)
        expected -= sum(full[row, start + i - 1, token].item() for i, token in enumerate(response))
    assert language_modelling_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    assert batch.target_count == sum(len(response) for _, response in pairs)
    assert batch.prompt_end.tolist() == [batch.input_ids.shape[1] - len(r) - 1 for _, r in pairs]
    assert (batch.targets[1, :1] == IGNORED).all()


def test_a_diverging_loss_stops_with_the_key_to_change(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(float("nan"))
    with pytest.raises(ModelError, match=r"training\.learning_rate"):
        run(model, tmp_path)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    model = adapted()
    name, parameter = next(iter(trainable(model).items()))
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    before = {key: value.clone() for key, value in trainable(model).items()}
    with pytest.raises(ModelError, match="gradient became nan"):
        run(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in trainable(model).items()), name


@pytest.mark.parametrize("fails", [False, True])
def test_cudnn_attention_is_off_while_it_trains(tmp_path: Path, fails: bool) -> None:
    seen = []

    def look(module, inputs) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        if fails:
            raise ZeroDivisionError

    model = adapted()
    model.register_forward_pre_hook(look)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        run(model, tmp_path)
    assert seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="attach an adapter"):
        run(build_tiny_llama(vocab_size=300).requires_grad_(False), tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(adapted(), tmp_path / "a")
    newest = sorted((tmp_path / "a").glob("step-*"))[-1]
    (newest / "optimizer.safetensors").write_bytes(b"broken")
    with pytest.raises(CorruptFile, match=newest.name):
        run(adapted(), tmp_path / "a")
    shutil.rmtree(newest)
    run(adapted(), tmp_path / "a")  # the one before is whole

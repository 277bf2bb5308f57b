"""A task of one word that tiny models learn in a few steps, for tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress_peft.adapters import Adapter
from compress_peft.data.examples import Example
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.training import TrainingSettings, train
from compress_peft.training.batches import encode_all
from compress_peft.training.loop import TrainingResult, _group
from compress_peft.training.losses import language_modelling_loss, response_output
from tests.conftest import build_tiny_llama

TOKENIZER = byte_tokenizer()
WORDS = {"red": " a", "green": " b", "blue": " c", "white": " d"}
EXAMPLES = tuple(Example(f"{word} {'x' * (i % 3)} ->", answer) for i in range(6) for word, answer in WORDS.items())
SEED = 3


def response_logits(model: Any, batch: Any) -> torch.Tensor:
    """Logits (batch, response, vocabulary) that predict `batch.targets`."""
    return response_output(model, batch).logits[:, -batch.targets.shape[1] - 1 : -1]


class Killed(Exception):
    pass


def model(seed: int = 0) -> Any:
    return build_tiny_llama(seed=seed, vocab_size=300)


def settings(**changes: Any) -> TrainingSettings:
    values = {"max_steps": 6, "batch_size": 6, "learning_rate": 1e-2, "eval_steps": 100, "patience": None}
    return TrainingSettings(**(values | {"schedule": "constant", "warmup": 0, "max_grad_norm": 0} | changes))


def fit(
    adapter: Adapter, folder: Path, killed_at: int = 0, on: Any = None, **changes: Any
) -> tuple[Any, TrainingResult]:
    """The trained model. killed_at: raises at the start of the step after this one."""
    torch.manual_seed(11)
    adapted = adapter.attach(model() if on is None else on)
    calls = 0

    def loss(model: Any, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += model.training
        if killed_at and calls > killed_at:
            raise Killed
        return language_modelling_loss(model, batch)

    result = train(
        adapted,
        TOKENIZER,
        EXAMPLES[:18],
        EXAMPLES[18:],
        settings(**changes),
        max_length=64,
        seed=SEED,
        checkpoints=folder,
        loss=loss,
        adapter=adapter,
    )
    return adapted, result


def batches_of(step: int, **changes: Any) -> list[Any]:
    """The batches that the loop takes in step `step`, from 1."""
    pairs = encode_all(TOKENIZER, EXAMPLES[:18], 64, True)
    return _group(pairs, TOKENIZER, settings(**changes), SEED, step - 1, 1)


def mean_loss(model: Any, batch: Any) -> torch.Tensor:
    return language_modelling_loss(model, batch) / batch.target_count

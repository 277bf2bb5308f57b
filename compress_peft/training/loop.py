"""The training loop, on accelerate: one loop for every adapter and every loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_scheduler

from compress_peft.data.examples import Example
from compress_peft.errors import MissingRequirement, ModelError, Problem
from compress_peft.models.evaluating import evaluating
from compress_peft.models.layers import is_encoder_decoder
from compress_peft.training.batches import Batch, TokenPair, batches, encode_all
from compress_peft.training.checkpoint import Progress, load_checkpoint, restore, save_checkpoint, snapshot, trainable
from compress_peft.training.hooks import Loss, PreparationBatches, TrainingHooks, set_learning_rate
from compress_peft.training.losses import language_modelling_loss
from compress_peft.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainingResult:
    """What training did; the model holds the weights of the best evaluation."""

    progress: Progress
    total_steps: int
    stopped_early: bool
    resumed_from: int
    trainable_parameters: int


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Training without cuDNN's attention, which torch prefers on Hopper GPUs: from torch 2.11 on its gradient is NaN
    for padded batches of 64 tokens more than a multiple of 128 (github.com/pytorch/pytorch/issues/196678)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@without_cudnn_attention()
def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Example | TokenPair],
    validation: Sequence[Example | TokenPair],
    settings: TrainingSettings,
    *,
    max_length: int,
    seed: int,
    checkpoints: Path,
    loss: Loss = language_modelling_loss,
    adapter: Any = None,
    together: int = 1,
) -> TrainingResult:
    """Train the parameters that require gradients, in place, and keep those of the best validation loss.

    adapter: the method that is trained, where it takes part in training (see hooks.py).
    together: of the training rows, so many that follow each other come into a batch together (the tasks of a problem).

    Continues from the newest checkpoint under `checkpoints`, to the same result as without interruption.

    Raises:
        ModelError: nothing to train, or loss or gradient are not finite.
        MissingRequirement: started in several processes.
    """
    if not trainable(model):
        raise ModelError(Problem("finetune", "no parameter requires a gradient", "attach an adapter first"))
    accelerator = Accelerator(cpu=_device(model).type == "cpu")
    if accelerator.num_processes > 1:
        what = f"it was started in {accelerator.num_processes} processes, and training uses one"
        raise MissingRequirement(
            Problem("finetune", what, "start it without torchrun or accelerate launch; --resume keeps the steps done")
        )
    apart = is_encoder_decoder(model)
    pairs = encode_all(tokenizer, training, max_length, settings.eos, apart)
    held_out = encode_all(tokenizer, validation, max_length, settings.eos, apart)
    total = planned_steps(len(pairs), settings)
    hooks: Any = adapter if adapter is not None else TrainingHooks()
    torch.manual_seed(seed)
    start = PreparationBatches(pairs, tokenizer, settings.batch_size, seed, loss, _device(model))
    hooks.prepare_training(model, start, total)
    optimizer: Any = hooks.make_optimizer(trainable(model), settings) or torch.optim.AdamW(
        trainable(model).values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule: Any = get_scheduler(
        settings.schedule, optimizer, num_warmup_steps=math.ceil(settings.warmup * total), num_training_steps=total
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(seed)
    found = load_checkpoint(checkpoints, model, optimizer.optimizer, schedule)
    progress, best = found if found else (Progress(), snapshot(model))
    resumed_from = progress.step
    patience = settings.patience or math.inf
    started = time.monotonic() - progress.seconds
    bar = tqdm(total=total, initial=progress.step, desc="training", unit="step")
    while progress.step < total and progress.evaluations_without_gain < patience:
        group = _group(pairs, tokenizer, settings, seed, progress.step, together)
        place = (progress.step + 1, total)
        set_learning_rate(optimizer.optimizer, schedule, hooks.learning_rate_factor(*place))
        rate = optimizer.optimizer.param_groups[0]["lr"]
        began = time.monotonic()
        value = _step(accelerator, model, optimizer, group, loss, settings.max_grad_norm, hooks, place)
        progress.step_seconds += time.monotonic() - began
        schedule.step()
        progress.step += 1
        progress.losses.append({"step": progress.step, "loss": value, "learning_rate": rate})
        bar.set_postfix(loss=f"{value:.4f}")
        bar.update()
        last = progress.step == total
        if progress.step % settings.eval_steps == 0 or last:
            counts = progress.step >= min(hooks.best_from(total), total)
            best = _evaluate(model, tokenizer, held_out, settings, loss, progress, best, counts)
        if progress.step % (settings.checkpoint_steps or settings.eval_steps) == 0 or last:
            progress.seconds = time.monotonic() - started
            save_checkpoint(checkpoints, model, optimizer.optimizer, schedule, progress, best)
    bar.close()
    restore(model, best)
    hooks.finish_training(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    count = sum(parameter.numel() for parameter in trainable(model).values())
    return TrainingResult(progress, total, progress.step < total, resumed_from, count)


def validation_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[TokenPair],
    batch_size: int,
    loss: Loss = language_modelling_loss,
) -> float:
    """Mean loss a response token (nats); the model is in evaluation mode meanwhile."""
    total, count = 0.0, 0
    by_length = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    with evaluating(model), torch.no_grad():
        for batch in batches(pairs, tokenizer, batch_size, by_length):
            total += loss(model, batch.to(_device(model))).item()
            count += batch.target_count
    return total / count


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def planned_steps(examples: int, settings: TrainingSettings) -> int:
    """Optimizer steps of a training on so many examples."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.ceil(settings.epochs * _steps_per_epoch(examples, settings)))


def _steps_per_epoch(examples: int, settings: TrainingSettings) -> int:
    return math.ceil(examples / (settings.batch_size * settings.gradient_accumulation))


def _group(
    pairs: Sequence[TokenPair],
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    seed: int,
    step: int,
    together: int,
) -> list[Batch]:
    """The batches of optimizer step `step`: a function of seed and step alone, so that a resumed run sees the same."""
    epoch, place = divmod(step, _steps_per_epoch(len(pairs), settings))
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    firsts = torch.randperm(len(pairs) // together, generator=generator) * together
    order = (firsts[:, None] + torch.arange(together)).flatten().tolist()
    size = settings.batch_size * settings.gradient_accumulation
    return list(batches(pairs, tokenizer, settings.batch_size, order[place * size : (place + 1) * size]))


def _step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    group: list[Batch],
    loss: Loss,
    max_grad_norm: float,
    hooks: Any,
    place: tuple[int, int],
) -> float:
    """One optimizer step over the group; returns the mean loss a token. place: this step and the number of all.

    Every token of the group has the same weight, however the tokens fall into batches.
    """
    model.train()
    hooks.before_step(model, *place)
    count = sum(batch.target_count for batch in group)
    total = 0.0
    for batch in group:
        value = hooks.training_loss(model, batch.to(accelerator.device), loss) / count
        accelerator.backward(value)
        total += value.item()
    _check("loss", total)
    penalty = hooks.training_penalty(model, *place)
    if penalty is not None:
        accelerator.backward(penalty)
    hooks.after_backward(model, *place)
    if max_grad_norm:
        _check("gradient", float(accelerator.clip_grad_norm_(trainable(model).values(), max_grad_norm)))
    optimizer.step()
    hooks.after_step(model, *place)
    hooks.change_optimizer(optimizer.optimizer, *place)
    optimizer.zero_grad()
    return total


def _check(what: str, value: float) -> None:
    """Before the optimizer's step, so that the weights stay those of the step before."""
    if not math.isfinite(value):
        fix = "lower training.learning_rate, or check the data and the backbone for infinities"
        raise ModelError(Problem("finetune", f"the training {what} became {value}", fix))


def _evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[TokenPair],
    settings: TrainingSettings,
    loss: Loss,
    progress: Progress,
    best: dict[str, Tensor],
    counts: bool,
) -> dict[str, Tensor]:
    """Validate, note the result in `progress`, and return the best weights so far. counts: whether it can be best."""
    value = validation_loss(model, tokenizer, held_out, settings.batch_size * 2, loss)
    if not math.isfinite(value):
        fix = "lower training.learning_rate, or check the data and the backbone for infinities"
        raise ModelError(Problem("finetune", f"the validation loss became {value}", fix))
    progress.validations.append({"step": progress.step, "loss": value})
    if not counts:
        return best
    if progress.best_loss is None or value < progress.best_loss:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = value, progress.step, 0
        return snapshot(model)
    progress.evaluations_without_gain += 1
    return best

"""Where a method can take part in training: called by the loop, implemented by adapters that need more than gradients.

    prepare_training            once, before the optimizer is made; also when training resumes
    make_optimizer
    for each step:  before_step -> forward and backward (+ training_penalty) -> after_backward -> clipping
                    -> optimizer.step -> after_step -> change_optimizer -> zero_grad
    finish_training             once, on the best weights

Steps count from 1. A method is stateless: what it must remember lives in parameters of the adapter or in buffers of
its layers, which checkpoints hold, so that a resumed run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from compress_peft.training.batches import Batch, TokenPair, batches
from compress_peft.training.settings import TrainingSettings

Loss = Callable[[nn.Module, Batch], Tensor]


class PreparationBatches:
    """The training split for `prepare_training`: iterating gives its batches once, in an order that depends on the
    seed alone."""

    def __init__(
        self,
        pairs: Sequence[TokenPair],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        seed: int,
        loss: Loss,
        device: torch.device,
    ):
        self._pairs, self._tokenizer, self._batch_size, self._loss = pairs, tokenizer, batch_size, loss
        self._device = device
        self._order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return -(-len(self._pairs) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches(self._pairs, self._tokenizer, self._batch_size, self._order):
            yield batch.to(self._device)

    def examples(self) -> Iterator[Batch]:
        """Batches of one example."""
        for batch in batches(self._pairs, self._tokenizer, 1, self._order):
            yield batch.to(self._device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean training loss of a response token, a scalar with a gradient."""
        return self._loss(model, batch) / batch.target_count


class TrainingHooks:
    """The hooks, doing nothing. `compress_peft.adapters.Adapter` has them under the same names."""

    def prepare_training(self, model: nn.Module, batches: PreparationBatches, total_steps: int) -> None:
        """Before the optimizer is made. Must do the same again when training resumes."""

    def make_optimizer(
        self, parameters: dict[str, nn.Parameter], settings: TrainingSettings
    ) -> torch.optim.Optimizer | None:
        """The optimizer of the trainable parameters; None: AdamW. Its state must consist of tensors."""
        return None

    def before_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """Before the forward passes of a step."""

    def training_loss(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        """Loss of a batch in training, summed over its targets. loss: the recipe's."""
        return loss(model, batch)

    def training_penalty(self, model: nn.Module, step: int, total_steps: int) -> Tensor | None:
        """A scalar that is added to the loss (nats a token), once a step."""
        return None

    def after_backward(self, model: nn.Module, step: int, total_steps: int) -> None:
        """The gradients are complete and not clipped yet."""

    def after_step(self, model: nn.Module, step: int, total_steps: int) -> None:
        """The optimizer has stepped; the gradients are still there."""

    def change_optimizer(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
        """After `after_step`: may change the optimizer's state."""

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """Multiplies the scheduled learning rate of a step."""
        return 1.0

    def best_from(self, total_steps: int) -> int:
        """The first step whose validation may be the best one: not before the method has its final form."""
        return 0

    def finish_training(self, model: nn.Module) -> None:
        """The model has the best weights; what training needed beside them can go."""


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Any, factor: float) -> None:
    """Scheduled rate times factor, for every group."""
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate * factor

"""Losses on the response tokens of a batch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from compress_peft.models.prompts import prompt_kwargs
from compress_peft.training.batches import IGNORED, Batch


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (batch, response, vocabulary) that predict `batch.targets`.

    Only these positions go through the vocabulary projection; for prompt positions it would be waste.
    """
    keep = batch.targets.shape[1] + 1
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=keep,
        use_cache=False,
        **prompt_kwargs(model, batch.prompt_end),
    )
    return output.logits[:, -keep:-1]


def language_modelling_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of the response tokens, a scalar in float32."""
    logits = response_logits(model, batch).float()
    return functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )

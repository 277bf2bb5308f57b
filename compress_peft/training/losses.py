"""Losses on the response tokens of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from compress_peft.models.encoder_decoder import align_right, split_rows
from compress_peft.models.layers import is_encoder_decoder
from compress_peft.models.prompts import prompt_kwargs
from compress_peft.tensors.cross_entropy import IGNORED, cross_entropy
from compress_peft.training.batches import Batch


def response_output(model: nn.Module, batch: Batch, output_hidden_states: bool = False) -> Any:
    """What transformers returns; the logits stand for the last `batch.targets.shape[1] + 1` positions.

    Only these positions go through the vocabulary projection; for prompt positions it would be waste. The decoder of
    an encoder-decoder has no others.
    """
    wanted = {"output_hidden_states": True} if output_hidden_states else {}
    if is_encoder_decoder(model):
        inputs = split_rows(model, batch.input_ids, batch.attention_mask, batch.prompt_end)
        output = model(**inputs, use_cache=False, **wanted)
        output.logits = align_right(output.logits, inputs["decoder_attention_mask"])
        return output
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.targets.shape[1] + 1,
        use_cache=False,
        **wanted,
        **prompt_kwargs(model, batch.prompt_end),
    )


def language_modelling_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the negative log-likelihoods (nats) of each row's response tokens: (batch,) float32."""
    logits: Tensor = response_output(model, batch).logits
    kept = batch.targets.shape[1] + 1
    if logits.shape[1] > kept:  # a model that computes all of them
        logits = logits[:, -kept:]
    # The last logits predict nothing. They stay, since autograd would copy all the others to leave them out.
    targets = functional.pad(batch.targets, (0, 1), value=IGNORED)
    return cross_entropy(logits, targets).sum(dim=1)


def language_modelling_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same sum for the whole batch: a scalar."""
    return language_modelling_losses(model, batch).sum()

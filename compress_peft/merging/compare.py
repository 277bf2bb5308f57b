"""How far a merged model is from the adapted one, on the same text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress_peft.models.bundle import bare_backbone
from compress_peft.models.encoder_decoder import split_rows
from compress_peft.models.evaluating import evaluating
from compress_peft.models.layers import is_encoder_decoder, linear_layers
from compress_peft.models.prompts import prompt_kwargs
from compress_peft.weights.compressed import CompressedWeight

COMPARED_TOKENS = 512


@torch.no_grad()
def sample_logits(model: nn.Module, batches: Iterable[Any], tokens: int = COMPARED_TOKENS) -> list[Tensor]:
    """float32 (n, vocabulary) on the CPU for each batch, at its real tokens in order; at most so many tokens in all.

    batches: objects or mappings with input_ids, attention_mask and, where there, position_ids and prompt_end, which an
    encoder-decoder needs; its logits are those of the response.
    """
    found: list[Tensor] = []
    left = tokens
    with evaluating(model):
        for batch in batches:
            if left <= 0:
                break
            get: Any = batch.get if hasattr(batch, "get") else lambda key, batch=batch: getattr(batch, key, None)
            mask = get("attention_mask")
            mask = torch.ones_like(get("input_ids")) if mask is None else mask
            end = get("prompt_end")
            if is_encoder_decoder(model):
                inputs = split_rows(model, get("input_ids"), mask, end)
                mask = inputs["decoder_attention_mask"]
            else:
                inputs = {"input_ids": get("input_ids"), "attention_mask": mask}
                inputs |= {} if end is None else prompt_kwargs(model, end)
                inputs |= {} if get("position_ids") is None else {"position_ids": get("position_ids")}
            logits = model(**inputs, use_cache=False).logits
            found.append(logits[mask.bool()][:left].float().cpu())
            left -= len(found[-1])
    return found


def compare_logits(reference: list[Tensor], other: list[Tensor]) -> dict[str, Any]:
    """Largest and mean difference of logits, KL(reference || other) in nats a token, share of equal greedy tokens."""
    largest = total = divergence = 0.0
    agree = tokens = 0
    for left, right in zip(reference, other, strict=True):
        difference = (left - right).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.mean(dim=1).sum())
        first, second = functional.log_softmax(left, dim=-1), functional.log_softmax(right, dim=-1)
        divergence += float(functional.kl_div(second, first, log_target=True, reduction="sum"))
        agree += int((left.argmax(-1) == right.argmax(-1)).sum())
        tokens += len(left)
    count = max(tokens, 1)
    return {
        "tokens": tokens,
        "logits_max_difference": largest,
        "logits_mean_difference": total / count,
        "kl": max(divergence / count, 0.0),
        "greedy_agreement": agree / count,
    }


def stored(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer -> component -> its bytes now, of every compressed layer; adapters are looked under. Copies."""
    with bare_backbone(model) if hasattr(model, "peft_config") else nullcontext(model) as bare:
        return {
            name: {part: tensor.detach().cpu().clone() for part, tensor in parameter.components().items()}
            for name, parameter in bare.named_parameters()
            if isinstance(parameter, CompressedWeight)
        }


def changed_bytes(before: dict[str, dict[str, Tensor]], after: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """By component, how many bytes of `before` are other ones in `after`, of how many; and the layers that are no
    longer compressed."""
    changed: dict[str, int] = {}
    total: dict[str, int] = {}
    for name, parts in before.items():
        for part, tensor in parts.items():
            old, new = tensor, after.get(name, {}).get(part)
            total[part] = total.get(part, 0) + old.numel() * old.element_size()
            if new is None or new.dtype != old.dtype or new.shape != old.shape:
                count = old.numel() * old.element_size()
            else:
                count = int((_bytes(old) != _bytes(new)).sum())
            changed[part] = changed.get(part, 0) + count
    return {"changed_bytes": changed, "stored_bytes": total, "became_dense": sorted(set(before) - set(after))}


def bits_per_weight(model: nn.Module) -> float | None:
    """Stored bits of a linear layer's weight, on average over the layers inside the blocks."""
    with bare_backbone(model) if hasattr(model, "peft_config") else nullcontext(model) as bare:
        weights = [layer.weight for _, layer in linear_layers(bare)]
    bits = sum(
        8 * (weight.storage_bytes if isinstance(weight, CompressedWeight) else weight.numel() * weight.element_size())
        for weight in weights
    )
    return bits / sum(weight.numel() for weight in weights) if weights else None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)

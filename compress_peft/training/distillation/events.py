"""A distribution over the vocabulary reduced to events: the teacher's k likeliest tokens, and "any other token".

Reducing both distributions to the same events can only lower a divergence (data-processing inequality), and with k as
large as the vocabulary nothing is lost. Unlike renormalizing over the k tokens, the student is still told how much
probability belongs elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Events:
    """What the teacher says at N positions.

    log_probs: (N, events) float32; the last event is "any other token" where there are ids.
    ids: (N, k) int64, the tokens of the other events; None: the events are the whole vocabulary.
    """

    log_probs: Tensor
    ids: Tensor | None


def teacher_events(logits: Tensor, temperature: float, top_k: int | None) -> Events:
    """logits: (N, vocabulary). top_k None or of the vocabulary's size keeps everything."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return Events(log_probs, None)
    ids = log_probs.topk(top_k, dim=-1).indices
    return Events(reduce_to(log_probs, ids), ids)


def student_events(logits: Tensor, temperature: float, ids: Tensor | None) -> Tensor:
    """Log-probabilities (N, events) of a teacher's events; logits: (N, vocabulary)."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return log_probs if ids is None else reduce_to(log_probs, ids)


def reduce_to(log_probs: Tensor, ids: Tensor) -> Tensor:
    """(N, vocabulary) -> (N, k + 1): the named tokens, then the mass of all others."""
    others = log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), others], dim=-1)

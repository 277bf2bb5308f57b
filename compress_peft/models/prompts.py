"""Where the prompt ends: the one thing that prompt-aware adapters need to know about a batch.

A position is an index into the padded row, per row: (batch,) int64; NO_PROMPT for a row of text without a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress_peft.errors import DataError, Problem

NO_PROMPT = -1
"""For rows of plain text: nothing of them may be pooled, since all of it is predicted."""


def is_prompt_aware(model: nn.Module) -> bool:
    """Whether the model carries an adapter that reads the prompt (its tuner declares `prompt_aware = True`)."""
    return bool(getattr(getattr(model, "base_model", None), "prompt_aware", False))


def prompt_kwargs(model: nn.Module, prompt_end: Tensor) -> dict[str, Tensor]:
    """Keyword arguments that tell `model` where the prompts end; empty for models that do not ask.

    prompt_end: (batch,) index, in the padded row, of each prompt's last token, or NO_PROMPT.
    """
    return {"prompt_end": prompt_end} if is_prompt_aware(model) else {}


def first_real_token(attention_mask: Tensor) -> Tensor:
    """Position of the first 1 in each row of a (batch, length) mask; 0 for a row of padding only."""
    return attention_mask.ne(0).int().argmax(dim=1)


def last_real_token(attention_mask: Tensor) -> Tensor:
    """Position of the last 1 in each row of a (batch, length) mask; the last position for a row of padding only."""
    return attention_mask.shape[1] - 1 - attention_mask.ne(0).int().flip(1).argmax(dim=1)


def before_first_label(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """Position before the first label that counts (!= -100); NO_PROMPT where labels start with the row or are none.

    labels: (batch, length), unshifted, as transformers expects them.
    """
    before = labels.ne(-100).int().argmax(dim=1) - 1
    return torch.where(before >= first_real_token(attention_mask), before, NO_PROMPT)


def check_prompt_end(prompt_end: Tensor, attention_mask: Tensor) -> Tensor:
    """`prompt_end` as int64 on the mask's device; NO_PROMPT passes.

    attention_mask: (batch, length).

    Raises:
        DataError: not one integer a row, or a position outside the row or in its padding.
    """
    batch, length = attention_mask.shape
    given = torch.as_tensor(prompt_end, device=attention_mask.device)
    fix = "give, for every row, the index in the padded row of the prompt's last token"
    if given.shape != (batch,) or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        what = f"expected {batch} integers, one a row; got shape {tuple(given.shape)} of {given.dtype}"
        raise DataError(Problem("prompt_end", what, fix))
    given = given.long()
    outside = (given < NO_PROMPT) | (given >= length)
    padding = attention_mask.gather(1, given.clamp(0, length - 1)[:, None])[:, 0].eq(0)
    wrong = outside | (padding & given.ne(NO_PROMPT) & attention_mask.ne(0).any(dim=1))
    if bool(wrong.any()):
        rows = wrong.nonzero()[:, 0].tolist()
        found = given.tolist()
        what = ", ".join(f"row {row}: {found[row]}" for row in rows[:8])
        raise DataError(Problem("prompt_end", f"outside the row (length {length}) or in its padding: {what}", fix))
    return given

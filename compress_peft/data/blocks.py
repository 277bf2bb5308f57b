"""Plain text as blocks of tokens, for perplexity and for calibration."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress_peft.errors import DataError, Problem

SHORTEST = 32
"""Characters of a passage whose presence in two texts is no accident."""


class CalibrationSettings(BaseModel):
    """The text on which a method looks at the activations."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    samples: PositiveInt = 64
    """Blocks of text."""

    length: PositiveInt = 512
    """Tokens in a block."""

    seed: int = 0
    """Decides which documents (of a single text: which blocks) are taken."""

    text: str | None = None
    """A text file; default: the documents of the training split."""


def text_blocks(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    block_size: int,
    max_blocks: int | None = None,
    where: str = "perplexity",
) -> Tensor:
    """Documents joined by the end-of-text token, cut into (blocks, block_size) token ids; the rest is dropped.

    where: the setting to name in errors.

    Raises:
        DataError: the text does not fill one block, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(Problem("tokenizer", "has no end-of-text token to join documents with", "define eos_token"))
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if max_blocks is not None and len(ids) >= max_blocks * block_size:
            break
    count = len(ids) // block_size
    if max_blocks is not None:
        count = min(count, max_blocks)
    if count == 0:
        what = f"the text has {len(ids)} tokens, one block needs {block_size}"
        raise DataError(Problem(where, what, f"give more text or smaller blocks ({where})"))
    return torch.tensor(ids[: count * block_size]).view(count, block_size)


def shared_passages(tokenizer: PreTrainedTokenizerBase, blocks: Tensor, evaluated: Iterable[str]) -> list[str]:
    """The passages (lines of at least SHORTEST characters) of either text that also stand in the other one.

    blocks: (samples, length) token ids of the calibration. Case and white space do not count.
    """
    end = tokenizer.eos_token or "\n"
    ours = _lines(str(tokenizer.decode(block)).replace(end, "\n") for block in blocks)
    theirs = _lines(evaluated)
    found: dict[str, None] = {}
    for passages, other in ((ours, theirs), (theirs, ours)):
        text = "\n".join(other)
        found |= dict.fromkeys(line for line in passages if len(line) >= SHORTEST and line in text)
    return list(found)


def _lines(texts: Iterable[str]) -> list[str]:
    return [" ".join(line.lower().split()) for text in texts for line in text.splitlines()]


def calibration_blocks(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], settings: CalibrationSettings
) -> Tensor:
    """(samples, length) int64 token ids, every one a real token: no padding.

    The documents are shuffled by the seed; of a single one, blocks are drawn all over it.

    Raises:
        DataError: the documents have fewer blocks than are asked for.
    """
    draw = random.Random(settings.seed)
    shuffled = draw.sample(documents, len(documents))
    most = settings.samples if len(shuffled) > 1 else None
    blocks = text_blocks(tokenizer, shuffled, settings.length, most, where="calibration")
    if len(blocks) < settings.samples:
        what = f"{settings.samples} blocks of {settings.length} tokens are asked for, the text has {len(blocks)}"
        raise DataError(Problem("calibration.samples", what, "ask for fewer or shorter blocks, or give more text"))
    return blocks[sorted(draw.sample(range(len(blocks)), settings.samples))]

"""Examples as left-padded token batches whose responses end each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from compress_peft.data.encode import encode_example, left_pad, padding_id, positions
from compress_peft.data.examples import Example
from compress_peft.tensors.cross_entropy import IGNORED

TokenPair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and response, padded at the start to a common length.

    input_ids, attention_mask, position_ids: (batch, length) int64.
    targets: (batch, response) int64, the last tokens of the rows; IGNORED where they belong to the prompt.
    prompt_end: (batch,) int64, position in the padded row of the prompt's last token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Tensor
    prompt_end: Tensor

    @property
    def target_count(self) -> int:
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example | TokenPair],
    max_length: int,
    eos: bool,
    apart: bool = False,
) -> list[TokenPair]:
    """Token ids of prompt and response of every example; those that are token ids already stay as they are.

    apart: for an encoder-decoder (see `encode_example`).
    """
    return [
        encode_example(tokenizer, item.prompt, item.response, max_length=max_length, eos=eos, apart=apart)
        if isinstance(item, Example)
        else item
        for item in examples
    ]


def collate(pairs: Sequence[TokenPair], pad_id: int) -> Batch:
    """One padded batch."""
    input_ids, attention_mask = left_pad([prompt + response for prompt, response in pairs], pad_id)
    length = input_ids.shape[1]
    responses = torch.tensor([len(response) for _, response in pairs])
    longest = int(responses.max())
    targets = input_ids[:, length - longest :].clone()
    from_end = torch.arange(longest, 0, -1)  # distance of each target from the row's end, 1 = last
    targets[from_end[None, :] > responses[:, None]] = IGNORED
    return Batch(input_ids, attention_mask, positions(attention_mask), targets, length - responses - 1)


def batches(
    pairs: Sequence[TokenPair], tokenizer: PreTrainedTokenizerBase, batch_size: int, order: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches of the pairs in the given order (default: as they are)."""
    pad_id = padding_id(tokenizer)
    rows = [pairs[index] for index in order] if order is not None else list(pairs)
    yield from DataLoader(rows, batch_size=batch_size, collate_fn=lambda part: collate(part, pad_id))  # type: ignore[arg-type]

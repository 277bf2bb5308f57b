"""Codes packed into int32 words, as the formats of other projects store them.

The codes of a row are one stream of bits, lowest first, across the words: what `affine.pack` makes of bytes, four bytes
a word. AWQ's kernels want the eight codes of a word in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compress_peft.tensors import affine

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs stands in the 1st, 2nd ... four bits of a word (AutoAWQ's GEMM layout)."""


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n), each below 2 ** bits -> int32 (rows, ceil(n * bits / 32)); what is left over is zero."""
    packed = affine.pack(codes, bits)
    # Flat: a single row may have any stride and still count as contiguous.
    return functional.pad(packed, (0, -packed.shape[1] % 4)).reshape(-1).view(torch.int32).view(len(codes), -1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_words`: int32 (rows, words) -> uint8 (rows, count)."""
    packed = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    return affine.unpack(packed[:, : affine.row_bytes(count, bits)].contiguous(), bits, count)


def interleave(codes: Tensor) -> Tensor:
    """(rows, n), n a multiple of 8: every eight neighbours into `AWQ_ORDER`."""
    return codes.view(codes.shape[0], -1, 8)[..., list(AWQ_ORDER)].reshape(codes.shape)


def deinterleave(codes: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    back = torch.tensor(AWQ_ORDER).argsort().tolist()
    return codes.view(codes.shape[0], -1, 8)[..., back].reshape(codes.shape)

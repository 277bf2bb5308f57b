"""Rotations folded into the weights, so that outliers spread over all channels before these are rounded.

    x -> x R1        the residual stream: compress_peft/models/rotation.py
    v -> v R2        each head's values: rows of v_proj; undone by the columns of o_proj

QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4, stages 1a and 1b; the names R1 and R2 are SpinQuant's (Liu et
al. 2024, arXiv 2405.16406). What needs work at run time is left out: the rotations in front of down_proj (R4), of keys
and queries (R3), and across heads, which serve activations and caches in few bits. The model stays a plain one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.models import rotation as residual_rotation
from compress_peft.models.layers import decoder_layers
from compress_peft.models.rotation import linears_by_name, rotate_outputs, rotate_residual


@torch.no_grad()
def rotate_model(model: Any, seed: int = 0) -> list[str]:
    """Rotate in place; the model computes the same but for rounding in its dtype. Returns notes.

    Worked out in float64.

    Raises:
        ModelError: the model is not of this form, compressed or pruned.
    """
    if problems := rotation_problems(model):
        raise ModelError(problems)
    generator = torch.Generator().manual_seed(seed)
    hidden = model.get_input_embeddings().weight.shape[1]
    residual, kind = rotation(hidden, generator)
    notes = []
    if added := rotate_residual(model, residual):
        notes.append(f"the head is tied no more: {added} parameters more; head_bits makes it small again")
    notes.append(f"residual stream of {hidden} rotated by a {kind}")
    for _, block in decoder_layers(model):
        layers = linears_by_name(block)
        value, out = layers["v_proj"], layers["o_proj"]
        size = out.in_features // model.config.num_attention_heads
        within = rotation(size, generator)[0].to(out.weight.device)
        rotate_outputs(value, torch.block_diag(*[within] * (value.out_features // size)))
        out.weight.copy_((out.weight.double().view(hidden, -1, size) @ within).flatten(1))
    return notes


def rotation_problems(model: Any) -> list[Problem]:
    """Why the model cannot be rotated; its weights may be on the meta device."""
    return residual_rotation.rotation_problems(model, "leave rotate out")


def rotation(size: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """An orthogonal float64 (size, size) matrix, and what it is: a Hadamard matrix with random signs (QuaRot, section
    3) if one of this size can be built from Sylvester's and Paley's, else the Q of a Gaussian matrix."""
    hadamard = hadamard_matrix(size)
    if hadamard is None:
        gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
        q, r = torch.linalg.qr(gaussian)
        return q * r.diagonal().sign(), "random orthogonal matrix"
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * hadamard / math.sqrt(size), "randomized Hadamard matrix"


def hadamard_matrix(size: int) -> Tensor | None:
    """Entries 1 and -1, orthogonal rows, float64 (size, size): a Kronecker product of what `_paley` and Sylvester
    give (576 = 36 * 16); None if the size has no such factors."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for order in range(size, 1, -1):
        if size % order == 0 and (factor := _paley(order)) is not None:
            rest = hadamard_matrix(size // order)
            if rest is not None:
                return torch.kron(rest, factor)
    return None


def _paley(order: int) -> Tensor | None:
    """Paley's first construction (order = q + 1, q % 4 == 3) or second (2 (q + 1), q % 4 == 1) for primes q."""
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    first = order - 1
    if first % 4 == 3 and _prime(first):
        return torch.eye(order, dtype=torch.float64) + _conference(first, -1.0)
    second = order // 2 - 1
    if order % 4 == 0 and second % 4 == 1 and _prime(second):
        ones, eye = [[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]
        filled = torch.kron(_conference(second, 1.0), torch.tensor(ones, dtype=torch.float64))
        return filled + torch.kron(torch.eye(second + 1, dtype=torch.float64), torch.tensor(eye, dtype=torch.float64))
    return None


def _conference(q: int, sign: float) -> Tensor:
    """[[0, 1], [sign, Q]] with Q[i, j] = 1 where i - j is a square modulo q, -1 where not, 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))

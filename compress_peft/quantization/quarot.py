"""Rotations folded into the weights, so that outliers spread over all channels before these are rounded.

    x -> x R1        the residual stream: embedding, outputs of o_proj and down_proj; undone by q, k, v, gate, up, head
    v -> v R2        each head's values: rows of v_proj; undone by the columns of o_proj

QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4, stages 1a and 1b; the names R1 and R2 are SpinQuant's (Liu et
al. 2024, arXiv 2405.16406). What needs work at run time is left out: the rotations in front of down_proj (R4), of keys
and queries (R3), and across heads, which serve activations and caches in few bits. The model stays a plain one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.layers import decoder_layers
from compress_peft.models.sparsity import pruned_layers
from compress_peft.weights import CompressedWeight

NORMS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
"""The norms in front of the layers that read the residual stream."""
WRITERS = ("o_proj", "down_proj")
"""The layers whose outputs are added to it."""
_FIX = "leave rotate out"


@torch.no_grad()
def rotate_model(model: Any, seed: int = 0) -> list[str]:
    """Rotate in place; the model computes the same but for rounding in its dtype. Returns notes.

    Worked out in float64. The weights of the norms become ones. A head that is tied to the embedding becomes one of
    its own, since a norm's weight goes into it.

    Raises:
        ModelError: the model is not of this form, compressed or pruned.
    """
    if problems := rotation_problems(model):
        raise ModelError(problems)
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    notes = []
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        notes.append(f"the head is tied no more: {head.weight.numel()} parameters more; head_bits makes it small again")
    hidden = embedding.weight.shape[1]
    residual, kind = rotation(hidden, generator)
    notes.append(f"residual stream of {hidden} rotated by a {kind}")
    _set(embedding.weight, embedding.weight.double() @ residual)
    _read(_final_norm(model), [head], residual)
    for _, block in decoder_layers(model):
        layers = _linears(block)
        for norm, readers in NORMS.items():
            _read(block.get_submodule(norm), [layers[name] for name in readers], residual)
        for name in WRITERS:
            _rotate_outputs(layers[name], residual)
        value, out = layers["v_proj"], layers["o_proj"]
        size = out.in_features // model.config.num_attention_heads
        within, _ = rotation(size, generator)
        _rotate_outputs(value, torch.block_diag(*[within] * (value.out_features // size)))
        _set(out.weight, (out.weight.double().view(hidden, -1, size) @ within).flatten(1))
    return notes


def rotation_problems(model: Any) -> list[Problem]:
    """Why the model cannot be rotated; its weights may be on the meta device."""
    name = type(model).__name__
    expected = {layer for readers in NORMS.values() for layer in readers} | set(WRITERS)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        return [Problem(name, "has no token embedding and linear head to rotate", _FIX)]
    if pruned := pruned_layers(model):
        return [Problem(name, f"is pruned ({len(pruned)} layers), and a rotation would fill the zeros", _FIX)]
    for path, block in decoder_layers(model):
        layers = _linears(block)
        own = {child for child, module in block.named_children() if child not in ("self_attn", "mlp")}
        if set(layers) != expected or own - set(NORMS) or not set(NORMS) <= own:
            found = ", ".join(sorted([*layers, *own]))
            return [Problem(path, f"is not a block like Llama's; it has {found}", _FIX)]
        if any(isinstance(layer.weight, CompressedWeight) for layer in layers.values()):
            return [Problem(path, "is compressed already", "rotate the original model")]
        if layers["o_proj"].in_features % model.config.num_attention_heads:
            return [Problem(path, "has heads of unequal sizes", _FIX)]
        for norm in NORMS:
            if not _is_rms_norm(block.get_submodule(norm)):
                return [Problem(f"{path}.{norm}", "is not an RMS norm with a plain weight", _FIX)]
    final = _final_norm(model)
    if final is None or not _is_rms_norm(final):
        return [Problem(name, "has no RMS norm with a plain weight in front of its head", _FIX)]
    if getattr(model.config, "embedding_multiplier", 1) != 1 or embedding.embedding_dim != head.in_features:
        return [Problem(name, "changes the embeddings on their way into the blocks", _FIX)]
    return []


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


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    """By last name."""
    return {n.rpartition(".")[2]: layer for n, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def _final_norm(model: Any) -> nn.Module | None:
    norm = getattr(model.base_model, "norm", None)
    return norm if isinstance(norm, nn.Module) else None


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Found by trying it, where it has values."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or getattr(module, "bias", None) is not None:
        return False
    if weight.device.type == "meta":
        return True
    given = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)) * 8 + 2
    want = given / given.square().mean(-1, keepdim=True).sqrt() * weight.float().cpu()
    got = module(given.to(weight)).float().cpu()
    return bool((got - want).norm() <= 2e-2 * want.norm())


def _read(norm: nn.Module | None, readers: list[nn.Linear], residual: Tensor) -> None:
    """Move the norm's weight into the layers behind it, which then read the rotated stream."""
    assert norm is not None
    weight = norm.weight
    assert isinstance(weight, Tensor)
    for layer in readers:
        _set(layer.weight, layer.weight.double() * weight.double() @ residual)
    weight.fill_(1)


def _rotate_outputs(layer: nn.Linear, matrix: Tensor) -> None:
    _set(layer.weight, matrix.T @ layer.weight.double())
    if layer.bias is not None:
        _set(layer.bias, matrix.T @ layer.bias.double())


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)

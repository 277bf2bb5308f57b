"""The column sweep of GPTQ (and of methods like it): compress one column, let the later ones make up for its error.

A layer computes x W^T, with W (out, in) and calibration inputs X (tokens, in). Changing W by E costs tr(E H E^T) with
the Hessian H = X^T X. Let H^-1 = U^T U with U upper triangular. Compressing column j of W to q leaves the error
e = (w_j - q) / U_jj, and the columns k > j that minimise the cost from there on are w_k - e U_jk: eq. 3 of GPTQ,
Frantar et al. 2022, arXiv 2210.17323, in the form of its section 3.3, step 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.tensors.finite import all_finite

BLOCK_COLUMNS = 128
"""Columns after which the rest of the matrix is updated at once (GPTQ, section 3.3, step 2)."""

INNER_COLUMNS = 32
"""Columns after which the rest of the block is: few and large products instead of many small ones."""

MOST_DAMPING = 1e4
"""Times the mean of the diagonal: a matrix that is still not positive definite is no Hessian."""

Compress = Callable[[int, Tensor], Tensor]
"""(j, current) -> the compressed column j, shape (out, 1).

current: (out, in - j), the columns from j on. Those of the present inner block have all updates up to here, those
beyond it in the block have the updates of the inner blocks before, those beyond the block have the updates of the
blocks before. So a group that starts with an inner block, and either ends within the block or starts with it, is
seen with all its updates, and so is one within an inner block (`fitting_block`).
"""


def add_gram(hessian: Tensor, inputs: Tensor, block: int = 256) -> None:
    """hessian += inputs^T inputs, in the upper triangle (by blocks) alone; `mirror` completes it.

    hessian: float32 (in, in). inputs: (tokens, in) of any floating dtype. Saves up to half of the products.
    """
    inputs = inputs.to(hessian.dtype)
    for start in range(0, hessian.shape[0], block):
        stop = start + block
        hessian[start:stop, start:].addmm_(inputs[:, start:stop].T, inputs[:, start:])


def mirror(hessian: Tensor) -> None:
    """Copy the upper triangle onto the lower one, in place."""
    hessian.triu_()
    hessian += hessian.triu(1).T


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, list[str]]:
    """The upper triangular U with U^T U = (H + damping * mean(diagonal) * I)^-1, and notes on what had to be done.

    hessian: (in, in), symmetric, of the dtype to compute in; not changed. The mean is over the live columns. A dead
    column (zero on the diagonal: no input ever used it) gets the diagonal 1; it stands apart from all others, so the
    sweep compresses it as it is. (The authors' code sets such weights to zero instead: the same cost on the
    calibration text, a larger one on any text that does use the column.)
    Where the damped matrix is not positive definite, the damping is raised tenfold until it is, which the notes tell.

    Raises:
        ModelError: NaN or infinite values, or not positive definite at any damping.
    """
    if not all_finite(hessian):
        what = "NaN or infinite inputs in the calibration pass"
        raise ModelError(Problem("hessian", what, "check the model's weights; in float16, load it as float32"))
    notes = []
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    live = int((~dead).sum())
    if live < len(dead):
        notes.append(f"{len(dead) - live} of {len(dead)} input columns were always zero: rounded to nearest")
    if not live:
        return torch.eye(len(dead), dtype=hessian.dtype, device=hessian.device), notes
    mean = diagonal[~dead].mean()
    share = damping
    while share <= MOST_DAMPING:
        # Turned around, H = R R^T with R upper triangular, and U = R^-1: one factorization and one triangular solve.
        turned = hessian.flip(0, 1)
        turned.diagonal().copy_(torch.where(dead, 1.0, diagonal + share * mean).flip(0))
        lower, info = torch.linalg.cholesky_ex(turned)
        if int(info) == 0 and all_finite(lower):
            del turned
            factor = lower.flip(0, 1)
            del lower
            invert_triangle(factor)
            if all_finite(factor):
                if share > damping:
                    notes.append(f"Hessian not positive definite: damping raised from {damping:g} to {share:g}")
                return factor, notes
        share = max(10 * share, 1e-4)
    what = f"not positive definite at a damping of {MOST_DAMPING:g}"
    raise ModelError(Problem("hessian", what, "give more calibration text"))


def invert_triangle(upper: Tensor, leaf: int = 256) -> None:
    """Replace an upper triangular matrix (n, n) by its inverse, by halves: of (A B; 0 C) it is (A' -A'BC'; 0 C').

    Fewer operations than solving for the identity, and no second matrix. What is below the diagonal has to be 0.
    """
    size = upper.shape[0]
    if size <= leaf:
        unit = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, unit, upper=True))
        return
    half = -(-size // (2 * leaf)) * leaf
    first, corner, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    invert_triangle(first, leaf)
    invert_triangle(last, leaf)
    corner.copy_((first @ corner).neg_() @ last)


def sweep(
    weight: Tensor,
    factor: Tensor,
    compress: Compress,
    block_columns: int = BLOCK_COLUMNS,
    inner_columns: int = INNER_COLUMNS,
    carry: Tensor | None = None,
) -> Tensor:
    """All columns from left to right; returns the compressed weight (out, in).

    weight: (out, in), not changed. factor: U of `inverse_factor`, (in, in), of the same dtype. carry: (in, in), what
    of column j, as it is before it is compressed, the columns k > j take besides the error (`drift_carry`).
    """
    columns = weight.shape[1]
    # Held as (in, out), so that a column lies in one piece.
    work = weight.detach().T.contiguous()
    if work.data_ptr() == weight.data_ptr():
        work = work.clone()
    diagonal = factor.diagonal()
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        errors = torch.empty_like(work[start:stop])
        before = None if carry is None else torch.empty_like(errors)
        with _one_thread():
            for inner in range(start, stop, inner_columns):
                end = min(inner + inner_columns, stop)
                for index in range(inner, end):
                    column = work[index]
                    compressed = compress(index, work[index:].T)[:, 0]
                    error = torch.sub(column, compressed, out=errors[index - start]).div_(diagonal[index])
                    if carry is not None and before is not None:
                        before[index - start] = column
                        work[index + 1 : end].addr_(carry[index, index + 1 : end], column)
                    column.copy_(compressed)
                    work[index + 1 : end].addr_(factor[index, index + 1 : end], error, alpha=-1)
                work[end:stop].addmm_(factor[inner:end, end:stop].T, errors[inner - start : end - start], alpha=-1)
                if carry is not None and before is not None:
                    work[end:stop].addmm_(carry[inner:end, end:stop].T, before[inner - start : end - start])
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if carry is not None and before is not None:
            work[stop:].addmm_(carry[start:stop, stop:].T, before)
    return work.T.contiguous()


def drift_carry(drift: Tensor, factor: Tensor) -> Tensor:
    """The `carry` of a sweep whose inputs X should give the outputs of other inputs X + D: (in, in), strictly upper.

    Column j takes part in that with its own share w_j D_j of the target, for which the best change of the columns
    F = {k > j} is w_j D_j X_F^T H_FF^-1. As H_FF^-1 = U_FF^T U_FF, all of these rows together are the strictly upper
    triangle of (D^T X) U^T, times U: the matrix P of GPTAQ, Li et al. 2025, arXiv 2504.02692.

    drift: D^T X, (in, in), in the order of the columns. factor: U of `inverse_factor`.
    """
    return (drift @ factor.T).triu_(1) @ factor


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many short operations: several threads gain nothing, and where other processes run, wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fitting_block(group_size: int, limit: int) -> int:
    """The largest number of columns up to `limit` whose multiples are group borders, or else divide a group."""
    if group_size <= limit:
        return limit // group_size * group_size
    return max(size for size in range(1, limit + 1) if group_size % size == 0)


def weighted_error(error: Tensor, hessian: Tensor, block: int = 512) -> float:
    """tr(E H E^T), the squared change of the layer's outputs over the calibration tokens.

    error: (out, in), hessian: (in, in), symmetric, of one dtype. Of the Hessian only the blocks of columns on and below
    the diagonal are multiplied, those below for their twins above too: half of the operations.
    """
    total = torch.zeros((), dtype=torch.float64, device=error.device)
    for start in range(0, error.shape[1], block):
        below = hessian[start:, start : start + block].clone()
        below[block:] *= 2
        total += (error[:, start:] @ below).mul_(error[:, start : start + block]).sum(dtype=torch.float64)
    return float(total)

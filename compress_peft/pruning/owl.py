"""OWL: blocks whose weights have many outliers are pruned less."""

from __future__ import annotations

import torch
from torch import Tensor

from compress_peft.models.walk import BlockWalk
from compress_peft.pruning.wanda import wanda_score


def count_outliers(walk: BlockWalk, m: float) -> dict[str, float]:
    """By block, the share of the weights whose Wanda score is more than m times the mean score of the block: the
    layerwise outlier distribution of OWL (Yin et al. 2023, arXiv 2310.05175, section 3).

    walk: over the unchanged model, with the norms of the inputs of the layers that count.
    """
    shares = {}
    for turn in walk:
        scores = [wanda_score(layer.weight.detach(), turn.statistics[name]) for name, layer in turn.layers.items()]
        if not scores:
            continue
        weights = sum(score.numel() for score in scores)
        limit = m * sum(float(score.sum(dtype=torch.float64)) for score in scores) / weights
        shares[turn.name] = sum(int((score > limit).sum()) for score in scores) / weights
    return shares


def owl_sparsity(shares: list[float], sizes: list[int], sparsity: float, spread: float) -> list[float]:
    """Each block's sparsity: 1 - sparsity is shared out in proportion to the outliers, within a range of 2 * spread.

    shares: of outliers, by block; sizes: weights of each block, for the mean. As in the authors' code, the shares are
    mapped onto a range of exactly 2 * spread and moved so that the mean over all weights is `sparsity`; where that
    leaves 0 .. 1, what is cut off goes to the other blocks.
    """
    outliers, weights = torch.tensor(shares, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    span = outliers.max() - outliers.min()
    if span == 0:
        return [sparsity] * len(shares)
    relative = -(outliers - outliers.min()) * (2 * spread / span)
    values: Tensor = relative
    low, high = sparsity - 1, sparsity + 1 + 2 * spread
    for _ in range(60):  # bisection of the shift, to the last bit
        middle = (low + high) / 2
        values = (relative + middle).clamp(0, 0.999)
        if float((values * weights).sum() / weights.sum()) < sparsity:
            low = middle
        else:
            high = middle
    result: list[float] = values.tolist()
    return result

"""What a block walk out of core takes, from shapes alone, and whether it is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import nn

from compress_peft.errors import MissingRequirement, Problem
from compress_peft.models.layers import decoder_layers
from compress_peft.models.walk import CHUNK_TOKENS


@dataclass(frozen=True)
class Needs:
    """Bytes, at most."""

    memory: float
    """At the peak, beyond what the process holds already."""
    disk: float
    """The result and what is needed on the way."""


def prefers_out_of_core(model: nn.Module, each: int) -> bool:
    """Whether the dense model would take more than half of the memory that is available. each: bytes of a weight."""
    dense = each * sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    return bool(dense > psutil.virtual_memory().available / 2)


def estimate_walk(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stored_bits: Callable[[tuple[int, int]], float],
    each: int,
    tokens: tuple[int, int],
    needs: Sequence[str],
    activation_bytes: float,
) -> Needs:
    """model: may be on the meta device. layers: those that are changed. each: bytes of a weight and of an activation.
    tokens: (samples, length) of the calibration.

    Memory: the largest block, and for its largest layer five matrices in float32 (the file's, the working copy, its
    rounded twin, their difference, a product). With calibration also the embeddings while the first activations are
    worked out, the activations up to their limit, those inside of one block for one chunk, and the statistics as if no
    two layers shared their input, with three more matrices for the factor of the largest.
    """
    blocks = decoder_layers(model)
    inside = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks}
    outside = sum(p.numel() for p in model.parameters()) - sum(inside.values())
    largest = max(inside.values()) * each + 5 * 4 * max(layer.weight.numel() for layer in layers.values())
    changed = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    kept = sum(inside.values()) - sum(rows * columns for rows, columns in changed.values())
    result = (outside + kept) * each + sum(r * c * stored_bits((r, c)) / 8 for r, c in changed.values())
    samples, length = tokens
    if not samples:
        return Needs(largest, result)
    hidden = model.config.get_text_config().hidden_size  # type: ignore[operator, union-attr]
    lists = 2 if "drift" in needs else 1
    states = float(lists * samples * length * hidden * each)
    matrices = ("hessian" in needs) + ("drift" in needs)
    statistics = 0.0
    widths = 0
    for name, block in blocks:
        columns = [shape[1] for key, shape in changed.items() if key.startswith(f"{name}.")]
        if columns and matrices:
            statistics = max(statistics, 4.0 * (matrices * sum(size**2 for size in columns) + 3 * max(columns) ** 2))
        widths = max(widths, sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear)))
    chunk = min(max(CHUNK_TOKENS, length), samples * length)
    passing = lists * chunk * (widths + 4 * hidden) * 4.0
    walking = statistics + passing + min(states, activation_bytes)
    embedding = model.get_input_embeddings().weight.numel() * each  # type: ignore[operator]
    return Needs(largest + max(walking, float(embedding)), result + max(states - activation_bytes, 0))


def check_room(needed: Needs, folder: Path, written: float = 0) -> None:
    """written: bytes of the result that are on the disk already.

    Raises:
        MissingRequirement: memory or disk will not do, with the figures.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(existing).free
    problems = []
    if needed.memory > memory:
        what = f"about {needed.memory / 1e9:.2f} GB are needed for one block, {memory / 1e9:.2f} GB are available"
        problems.append(Problem("memory", what, "end other programs, or use fewer or shorter calibration samples"))
    if needed.disk - written > disk:
        what = f"about {(needed.disk - written) / 1e9:.2f} GB are needed under {existing}, {disk / 1e9:.2f} GB are free"
        problems.append(Problem("disk", what, "free some space, or choose another disk"))
    if problems:
        raise MissingRequirement(problems)

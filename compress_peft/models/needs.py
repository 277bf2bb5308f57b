"""What work on a model's blocks takes, in memory and out of core, from shapes alone, and whether it is there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from compress_peft.errors import MissingRequirement, Problem
from compress_peft.models.layers import decoder_layers, linear_layers
from compress_peft.models.walk import chunk_tokens

LAYER_COPIES = 5
"""Float32 matrices like the largest layer while it is changed: a working copy, codes or ranks of the weights, the
rounded twin, the difference, and a product for its error."""

FACTOR_COPIES = 5
"""Matrices like a Hessian, beside it, while it is inverted: it in the order of the columns, its factor, that turned
around, the unit matrix, the inverse."""


@dataclass(frozen=True)
class Needs:
    """Bytes, at most."""

    memory: float
    """At the peak, beyond what the process holds already."""
    disk: float
    """The result and what is needed on the way."""


@dataclass(frozen=True)
class BlockWidths:
    """Numbers a token that the blocks hold, from the layers as they are (pruned ones too)."""

    hidden: int
    blocks: int
    attention: int
    """Heads times head size: what enters the output projection."""
    inner: int
    """What enters the down projections, all blocks together."""
    outputs: int
    """What leaves the linear layers, all blocks together."""

    @classmethod
    def of(cls, model: nn.Module) -> BlockWidths:
        config = text_config(model)
        hidden, blocks = config.hidden_size, len(decoder_layers(model))
        heads = getattr(config, "num_attention_heads", None)
        attention = heads * head_size(config) if heads else hidden
        layers = [layer for _, layer in linear_layers(model)]
        inner = sum(layer.in_features for layer in layers if layer.in_features not in (hidden, attention))
        return cls(hidden, blocks, attention, inner, sum(layer.out_features for layer in layers))

    @property
    def passing(self) -> int:
        """At most alive in one block of a forward pass: the stream twice, and the MLP's three or the attention's
        five."""
        return 2 * self.hidden + max(3 * self.inner // self.blocks, 5 * self.attention)

    def saved(self, everything: bool) -> int:
        """Kept by a block for the backward pass: what its linear layers put out (the two that close a branch: the
        stream after it), two normalized streams, the attention's result before and after its heads are joined, and
        the two factors' product and the activation in the MLP. everything: the norms train too, and keep what they
        scale."""
        streams = (4 if everything else 2) * self.hidden
        return (self.outputs + 2 * self.inner) // self.blocks + streams + 2 * self.attention


def text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def head_size(config: Any) -> int:
    named = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)  # the second is T5's
    return named or config.hidden_size // config.num_attention_heads


def prefers_out_of_core(model: nn.Module, each: int) -> bool:
    """Whether the dense model would take more than half of the memory that is available. each: bytes of a weight."""
    dense = each * sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    return bool(dense > psutil.virtual_memory().available / 2)


def walk_bytes(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    each: int,
    tokens: tuple[int, int],
    needs: Sequence[str],
    copies: float = 0,
    kept: bool = False,
    activation_bytes: float = math.inf,
) -> float:
    """Of a walk over the blocks at its peak, beyond the weights of the model or of the block, at most.

    model: may be on the meta device. layers: those that are changed, or looked at. each: bytes of a weight and of an
    activation. tokens: (samples, length) of the calibration, (0, 0) without. copies: of the changed weights of a block,
    float32, that are held beside them. kept: so are all activations of the block for a chunk; with copies the block is
    trained, and what it put out before for all of the text is there too. activation_bytes: activations between blocks
    beyond these are on disk.

    Activations between two blocks, and at one of them either a pass of one chunk, or the work on the largest layer, or
    the inversion of its Hessian, beside the block's statistics (as if no two layers shared their input).
    """
    by_block = [
        [layer for name, layer in layers.items() if name.startswith(f"{block}.")] for block, _ in decoder_layers(model)
    ]
    changed = max(sum(layer.weight.numel() for layer in block) for block in by_block)
    largest = max((layer.weight.numel() for layer in layers.values()), default=0)
    work = 4.0 * (LAYER_COPIES * largest + copies * changed)
    samples, length = tokens
    if not samples:
        return work
    widths = BlockWidths.of(model)
    lists = max(_streams(needs), 2 if kept and copies else 1)
    states = float(lists * samples * length * widths.hidden * each)
    chunk = min(max(chunk_tokens(needs), length), samples * length)
    held = 2 * widths.hidden + widths.attention  # inputs of layers, until the pass ends
    passing = 4.0 * chunk * (widths.passing + held) * (2 if "drift" in needs else 1)
    if kept:  # while others pass, backwards or in a second pass
        passing += 4.0 * chunk * widths.saved(everything=True) + 4.0 * copies * changed
    matrices = ("hessian" in needs) + ("drift" in needs)
    sizes = [[layer.in_features**2 for layer in block] for block in by_block]
    statistics = 4.0 * matrices * max(sum(block) for block in sizes)
    one = 4.0 * max(max(block, default=0) for block in sizes) if matrices else 0.0
    return min(states, activation_bytes) + statistics + max(passing, FACTOR_COPIES * one, one + work)


def estimate_walk(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    stored_bits: Callable[[tuple[int, int]], float],
    each: int,
    tokens: tuple[int, int],
    needs: Sequence[str],
    activation_bytes: float,
    copies: float = 0,
    kept: bool = False,
) -> Needs:
    """Of a walk out of core; arguments as for `walk_bytes`, of which it is the working memory.

    Memory: that and the largest block; or what stands outside of the blocks, of which the largest tensor is read, and
    checked, as a whole, and the embeddings are there while the first activations are worked out.
    """
    blocks = decoder_layers(model)
    inside = {name: sum(p.numel() for p in block.parameters()) for name, block in blocks}
    prefixes = tuple(f"{name}." for name in inside)
    outside = [p.numel() for name, p in model.named_parameters() if not name.startswith(prefixes)]
    changed = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    same = sum(outside) + sum(inside.values()) - sum(rows * columns for rows, columns in changed.values())
    result = same * each + sum(r * c * stored_bits((r, c)) / 8 for r, c in changed.values())
    walking = walk_bytes(model, layers, each, tokens, needs, copies, kept, activation_bytes)
    block, largest = max(inside.values()) * each, max(outside) * (2 * each + 2)  # with what the check for NaN makes
    samples, length = tokens
    spilled = max(_streams(needs) * samples * length * text_config(model).hidden_size * each - activation_bytes, 0.0)
    return Needs(block + max(walking, largest), result + spilled)


def _streams(needs: Sequence[str]) -> int:
    """Lists of activations between two blocks: those of the unchanged model may be among them."""
    return 2 if {"drift", "targets"} & set(needs) else 1


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

"""AutoRound: which way to round, and how far to cut each group, learned by signed gradient descent on block outputs."""

from __future__ import annotations

import zlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.models.walk import BlockTurn
from compress_peft.quantization.base import (
    QUANTIZERS,
    Bits,
    GroupSize,
    Prepared,
    Quantizer,
    affine_bits,
    affine_problem,
)
from compress_peft.quantization.rtn import RTN
from compress_peft.tensors import affine
from compress_peft.tensors.grid_search import search_shares
from compress_peft.weights import AffineWeight, CompressedWeight
from compress_peft.weights.compressed import dtype_from_name
from compress_peft.weights.kernels import product_dtype

PRESETS: dict[str, tuple[int, float]] = {"default": (200, 1 / 200), "light": (50, 5e-3)}
"""(iters, lr), as the authors recommend."""


@QUANTIZERS.register
class AutoRound(Quantizer):
    """Learned rounding: W = s (clamp(round(W / s + z + V)) - z), with V and the ranges trained per block (eq. 3 to 5).

    V, one per weight in [-0.5, 0.5], and the factors alpha and beta in [0, 1] on each group's largest and smallest
    weight, which start where `grid` says, go the way of the sign of their gradients, straight through the roundings.
    The loss is the mean squared distance of the block's output, for inputs from the quantized blocks before, to what
    the block puts out in the unchanged model, so that a block makes up for the errors of those before it. The best of
    all steps is kept, where a step counts by its loss over that of the start on the same batch, so that an easy batch
    is not taken for a good step.
    """

    paper: ClassVar[str] = "AutoRound (SignRound), Cheng et al. 2023, arXiv 2309.05516"
    needs: ClassVar[tuple[str, ...]] = ("inputs", "targets", "norms")
    block_copies: ClassVar[float] = 7
    keeps_activations: ClassVar[bool] = True

    method: Literal["autoround"] = "autoround"

    bits: Bits = 4
    """Bits of a code."""

    group_size: GroupSize = 64
    """Consecutive weights of a row that share a scale and a zero: a multiple of 8 that divides the layer's inputs.
    null: the whole row (per channel)."""

    symmetric: bool = False
    """Fix the zero in the middle of the codes: 0.125 bits a weight less at groups of 64, and a larger error."""

    preset: Literal["default", "light"] = "default"
    """default: 200 steps a block; light: 50, in a quarter of the time."""

    iters: int | None = Field(default=None, ge=0)
    """Steps a block; null: those of the preset. 0 is round to nearest."""

    lr: float | None = Field(default=None, gt=0)
    """Size of the first step, from which it falls to 0; null: 1 / iters, and 0.005 in the light preset."""

    batch_size: int = Field(default=8, gt=0)
    """Calibration samples a step, rounded to the chunks in which the blocks are run (1024 tokens or one sample)."""

    grid: Literal["weighted", "minmax"] = "weighted"
    """Where the ranges start. weighted: where rounding to nearest costs least on the calibration inputs
    (`search_shares`); minmax: at each group's smallest and largest weight, as in the paper."""

    clip: bool = True
    """Train the ranges too, not only the rounding."""

    amp: bool = True
    """Run the blocks in bfloat16 while learning, as the authors do, where the processor multiplies it in hardware. What
    is learned, and the loss, stay in float32."""

    seed: int = 0
    """Of the order of the samples."""

    scale_dtype: Literal["float16", "float32"] = "float16"
    """How scales are stored. Codes are chosen with the scales as they are stored."""

    calibration: CalibrationSettings = CalibrationSettings()
    """The calibration text; its length is the length of the sequences in the loss."""

    @property
    def schedule(self) -> tuple[int, float]:
        """(iters, lr)"""
        iters, lr = PRESETS[self.preset]
        if self.iters is not None:
            iters, lr = self.iters, 1 / max(self.iters, 1)
        return iters, self.lr or lr

    def prepare_block(self, turn: BlockTurn, shared: Container[str]) -> Prepared:
        """All layers of the block at once."""
        layers = {name: layer for name, layer in turn.layers.items() if not isinstance(layer.weight, CompressedWeight)}
        if not layers:
            return Prepared()
        rounding = {
            name: Rounding.start(layer.weight, self, turn.statistics[name].square_sum) for name, layer in layers.items()
        }
        gain = self.train(turn, rounding)
        note = (turn.name, f"error of the block's output: {gain:.3f} times that of rounding to nearest at the start")
        return Prepared({name: found.weight() for name, found in rounding.items()}, (note,))

    def train(self, turn: BlockTurn, rounding: dict[str, Rounding]) -> float:
        """Leave the best values in rounding; returns their loss over that of rounding to nearest, all samples."""
        block = _Block(turn, self.amp)
        inputs, wanted = turn.inputs, turn.targets
        plain = block.losses(rounding, inputs, wanted)
        iters, lr = self.schedule
        tuned = [tensor for found in rounding.values() for tensor in found.tuned(self.clip)]
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(turn.name.encode()))
        size = min(max(self.batch_size // len(inputs[0]), 1), len(inputs))
        best, least = [tensor.clone() for tensor in tuned], 1.0
        for step in range(iters):
            batch = torch.randperm(len(inputs), generator=generator)[:size].tolist()
            expected = sum(plain[index] for index in batch)
            if not expected:
                break
            loss, gradients = block.gradients(rounding, self.clip, [(inputs[index], wanted[index]) for index in batch])
            if loss / expected < least:
                least, best = loss / expected, [tensor.clone() for tensor in tuned]
            for tensor, gradient in zip(tuned, gradients, strict=True):
                tensor.sub_(gradient.sign_(), alpha=lr * (1 - step / iters))
            for found in rounding.values():
                found.clamp()
        for tensor, value in zip(tuned, best, strict=True):
            tensor.copy_(value)
        total = sum(plain)
        return sum(block.losses(rounding, inputs, wanted)) / total if total else 1.0

    def quantize(self, weight: Tensor, stats: Any = None) -> AffineWeight:
        """A weight on its own, with no inputs to look at: rounding to nearest."""
        settings = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric", "scale_dtype")}
        return RTN(**settings).quantize(weight)

    def estimate_bits(self, shape: tuple[int, int]) -> float:
        return affine_bits(shape, self.bits, self.group_size, self.symmetric, dtype_from_name(self.scale_dtype))

    def check(self, shape: tuple[int, int]) -> str | None:
        return affine_problem(shape, self.group_size)


class Grid(NamedTuple):
    """Of a layer's groups, each float32 (out, groups, 1)."""

    low: Tensor
    """The smallest weight, or what is left of it."""
    scales: Tensor
    zeros: Tensor


class Rounded(NamedTuple):
    """A layer as it is rounded now."""

    weight: Tensor
    """What the codes stand for, (out, in), in the dtype of the dense one."""
    codes: Tensor
    """float32 (out, groups, group)"""
    inside: Tensor
    """bool, the same shape: where no code was cut."""
    grid: Grid


@dataclass
class Rounding:
    """What is learned of one layer. At the start it is rounding to nearest on the given grid, bit for bit."""

    dense: Tensor
    """(out, in), as it is in the model."""
    settings: AutoRound
    offset: Tensor
    """V, float32 (out, in)"""
    high: Tensor
    """alpha, float32 (out, groups, 1)"""
    low: Tensor
    """beta, the same"""
    ends: tuple[Tensor, Tensor]
    """The smallest and the largest weight of each group, or 0, float32 (out, groups, 1)."""

    @classmethod
    def start(cls, weight: Tensor, settings: AutoRound, inputs: Tensor) -> Rounding:
        """weight: (out, in). inputs: (in,), the sums of their squares."""
        rows, columns = weight.shape
        shares = torch.ones(rows, affine.group_count(columns, settings.group_size), device=weight.device)
        if settings.grid == "weighted":
            dtype = dtype_from_name(settings.scale_dtype)
            shares = search_shares(weight, inputs, settings.bits, settings.group_size, settings.symmetric, dtype)
        dense, high, offset = weight.detach(), shares[..., None], torch.zeros(weight.shape, device=weight.device)
        smallest, largest = dense.float().view(*shares.shape, -1).aminmax(dim=2, keepdim=True)
        return cls(dense, settings, offset, high, high.clone(), (smallest.clamp(max=0), largest.clamp(min=0)))

    @property
    def top(self) -> int:
        return 2**self.settings.bits - 1

    def tuned(self, clip: bool) -> list[Tensor]:
        return [self.offset, self.high, self.low] if clip else [self.offset]

    def clamp(self) -> None:
        self.offset.clamp_(-0.5, 0.5)
        self.high.clamp_(0, 1)
        self.low.clamp_(0, 1)

    def groups(self) -> Tensor:
        """The dense weight, float32 (out, groups, group)."""
        return self.dense.float().view(*self.high.shape[:2], -1)

    def grid(self) -> Grid:
        low, high = self.ends[0] * self.low, self.ends[1] * self.high
        if self.settings.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales = affine.round_scales(high / self.top - low / self.top, dtype_from_name(self.settings.scale_dtype))
        if self.settings.symmetric:
            return Grid(low, scales, torch.full_like(scales, affine.symmetric_zero(self.settings.bits)))
        return Grid(low, scales, (-low / scales).round_().clamp_(0, self.top))

    @torch.no_grad()
    def rounded(self) -> Rounded:
        grid = self.grid()
        groups = self.groups()
        free = (groups / grid.scales).add_(grid.zeros).add_(self.offset.view_as(groups)).round_()
        codes = free.clamp(0, self.top)
        weight = (codes - grid.zeros).mul_(grid.scales).view(self.dense.shape).to(self.dense.dtype)
        return Rounded(weight, codes, free == codes, grid)

    @torch.no_grad()
    def pull_back(self, rounded: Rounded, gradient: Tensor, clip: bool) -> list[Tensor]:
        """The gradients of `tuned(clip)`, straight through the roundings of codes, zeros and scales.

        gradient: that of the weight in rounded, float32 (out, in).
        """
        codes, (low, scales, zeros) = rounded.codes, rounded.grid
        upstream = gradient.view_as(codes)
        by_offset = (upstream * scales).mul_(rounded.inside)
        found = [by_offset.view_as(self.offset)]
        if not clip:
            return found
        # weight = (clamp(dense / scale + zero + V) - zero) scale
        whole = upstream.sum(2, keepdim=True)
        by_scale = (upstream * codes).sum(2, keepdim=True) - zeros * whole
        by_scale -= (by_offset * self.groups()).sum(2, keepdim=True) / scales.square()
        if self.settings.symmetric:  # scale = 2 max(-low, high) / top
            below, above = -self.ends[0] * self.low, self.ends[1] * self.high
            share = (below > above).float() + 0.5 * (below == above)
            by_high, by_low = by_scale * (2 / self.top) * (1 - share), by_scale * (-2 / self.top) * share
        else:  # scale = (high - low) / top, zero = -low / scale
            by_zero = by_offset.sum(2, keepdim=True) - scales * whole
            by_zero *= (-low / scales).round_() == zeros
            by_scale += by_zero * low / scales.square()
            by_high, by_low = by_scale / self.top, -by_zero / scales - by_scale / self.top
        return [*found, by_high * self.ends[1], by_low * self.ends[0]]

    def weight(self) -> AffineWeight:
        settings = self.settings
        _, codes, _, grid = self.rounded()
        return AffineWeight.from_codes(
            codes.to(torch.uint8).view(self.dense.shape),
            grid.scales[..., 0],
            None if settings.symmetric else grid.zeros[..., 0].to(torch.uint8),
            settings.bits,
            settings.group_size,
            self.dense.dtype,
            dtype_from_name(settings.scale_dtype),
        )


class _Block(nn.Module):
    """The block of a turn, run with other weights."""

    def __init__(self, turn: BlockTurn, amp: bool = False):
        super().__init__()
        self.block = turn.block
        self.amp = amp
        self.run = turn.run
        self.prefix = len(turn.name)

    def forward(self, states: Tensor) -> Tensor:
        return self.run(states)

    def loss(self, weights: dict[str, Tensor], states: Tensor, wanted: Tensor) -> Tensor:
        """weights: by full name of the layer."""
        named = {f"block{name[self.prefix :]}.weight": weight for name, weight in weights.items()}
        half = self.amp and product_dtype(torch.bfloat16, states.device) == torch.bfloat16
        with torch.autocast(states.device.type, torch.bfloat16, enabled=half):
            output = functional_call(self, named, (states,))
        return nn.functional.mse_loss(output.float(), wanted.float())

    @torch.no_grad()
    def losses(self, rounding: dict[str, Rounding], inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
        """By chunk."""
        weights = {name: found.rounded().weight for name, found in rounding.items()}
        return [float(self.loss(weights, *pair)) for pair in zip(inputs, wanted, strict=True)]

    def gradients(
        self, rounding: dict[str, Rounding], clip: bool, batch: list[tuple[Tensor, Tensor]]
    ) -> tuple[float, list[Tensor]]:
        """The summed loss over the chunks, and its gradients by what is tuned."""
        rounded = {name: found.rounded() for name, found in rounding.items()}
        weights = {name: now.weight.requires_grad_() for name, now in rounded.items()}
        sums: list[Tensor] = []
        loss = 0.0
        for states, wanted in batch:
            with torch.enable_grad():
                part = self.loss(weights, states, wanted)
            found = torch.autograd.grad(part, list(weights.values()))
            sums = [t.add_(g) for t, g in zip(sums, found, strict=True)] if sums else [g.float() for g in found]
            loss += part.item()
        pairs = zip(rounding.items(), sums, strict=True)
        return loss, [g for (name, found), total in pairs for g in found.pull_back(rounded[name], total, clip)]

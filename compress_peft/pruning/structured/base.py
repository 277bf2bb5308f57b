"""The kind of method that takes whole structures out of a model: it plans first, then the model is cut."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from compress_peft.data.blocks import CalibrationSettings
from compress_peft.errors import ModelError, Problem
from compress_peft.pruning.structured.anatomy import anatomy
from compress_peft.pruning.structured.plan import Plan, refusal
from compress_peft.registry import Method, Registry


class Shrinker(Method):
    """Settings of a structured pruner. All blocks come out alike, so that plain transformers loads the result."""

    gradients: ClassVar[bool] = False
    """Whether gradients of all blocks are held at once."""

    method: str

    sparsity: float = Field(default=0.2, gt=0, lt=1)
    """Share of the parameters in the decoder blocks that goes, as near as the rounding allows."""

    calibration: CalibrationSettings = CalibrationSettings()
    """The calibration text."""

    def widths(self, model: nn.Module) -> Plan:
        """A plan of the right sizes with arbitrary indices; the model may be without weights.

        Raises:
            ModelError: the blocks cannot be cut like this.
        """
        raise NotImplementedError

    def plan(self, model: nn.Module, calibration: Tensor) -> tuple[Plan, dict[str, list[float]]]:
        """What goes, and the scores it was chosen by, by block (high stays). calibration: (samples, length) token ids.
        The model is left as it is."""
        raise NotImplementedError


class WidthShrinker(Shrinker):
    """Shrinkers of attention (whole key/value groups with their query heads) and MLP channels."""

    parts: Literal["both", "mlp", "attention"] = "both"
    """What gets narrower. A key/value group can be a large share of a block: the MLP makes up for the difference. Only
    as many heads stay as transformers takes (for Llama a divisor of the hidden size), which can mean all of them."""

    multiple_of: PositiveInt = 32
    """The number of MLP channels that stay is rounded to a multiple of this, for the sake of kernels."""

    def widths(self, model: nn.Module) -> Plan:
        return self._widths(model, self.sparsity)

    def _widths(self, model: nn.Module, sparsity: float) -> Plan:
        blocks = anatomy(model)
        first = blocks[0]
        whole = sum(layer.weight.numel() for layer in first.layers)
        group = sum(layer.weight.numel() for layer in (first.q, first.k, first.v, first.o)) / first.groups
        channel = sum(layer.weight.numel() for layer in (*first.readers, first.down)) / first.channels
        drop = 0
        if self.parts != "mlp":
            share = sparsity if self.parts == "both" else sparsity * whole / (group * first.groups)
            most = min(first.groups - 1, int(sparsity * whole / group + 1e-9))
            drop = min(
                (drop for drop in range(most + 1) if _takes(model, first.groups - drop)),
                key=lambda drop: abs(drop - share * first.groups),
            )
        kept = first.channels
        if self.parts != "attention":
            kept = round((first.channels - (sparsity * whole - drop * group) / channel) / self.multiple_of)
            kept = min(kept * self.multiple_of, first.channels)
        what = ""
        if drop == 0 and kept == first.channels:
            what = f"nothing of its {self.parts} parts comes near {sparsity:g} of a block"
        elif drop >= first.groups or kept <= 0:
            what = f"{sparsity:g} of a block would leave nothing of its {self.parts} parts"
        if what:
            have = (
                f"it has {first.groups} key/value groups and {first.channels} MLP channels, cut by {self.multiple_of}"
            )
            raise ModelError(Problem(first.name, f"{what}: {have}", "change sparsity, multiple_of or parts"))
        groups = {parts.name: list(range(first.groups - drop)) for parts in blocks} if drop else None
        channels = {parts.name: list(range(kept)) for parts in blocks} if kept < first.channels else None
        return Plan(groups=groups, channels=channels)

    def choose(self, sizes: Plan, groups: dict[str, Tensor], channels: dict[str, Tensor]) -> Plan:
        """The plan of these sizes that keeps the highest scores of each block."""
        return Plan(
            groups=sizes.groups and {name: best(groups[name], len(kept)) for name, kept in sizes.groups.items()},
            channels=sizes.channels
            and {name: best(channels[name], len(kept)) for name, kept in sizes.channels.items()},
            hidden=sizes.hidden,
        )


def _takes(model: Any, groups: int) -> bool:
    """Whether transformers takes the model's configuration with so many key/value groups."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_attention_heads = text.num_attention_heads // text.num_key_value_heads * groups
    text.num_key_value_heads = groups
    return refusal(config) is None


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


SHRINKERS: Registry[Shrinker] = Registry("structured pruner", "method")

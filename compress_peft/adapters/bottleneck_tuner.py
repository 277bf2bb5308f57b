"""Bottleneck adapters as a tuner of Hugging Face peft: y + s * up(f(down(x))) beside or after a module.

        sequential                      parallel
    x -> module -> y -+--------> +    x -+-> module ---------> +
                      +-> adapter ^      +-> adapter * s ------^

The two projections are matrices (Houlsby, Pfeiffer, parallel) or sums of Kronecker products (Compacter).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from compress_peft.adapters.native import WrapConfig, WrapLayer, WrapTuner, register_tuner


class BottleneckType(enum.StrEnum):
    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(WrapConfig):
    """What peft saves as adapter_config.json.

    hidden_size: d, width of input and output. r: width of the bottleneck. scale: factor of the adapter's output.
    parallel: the adapter reads the module's input instead of its output. init_std: of the down-projection; None
    draws it uniformly in +-1/sqrt(d). phm_dim: n, terms of the Kronecker sums; 0 for plain matrices. phm_rank: of B_i.
    """

    hidden_size: int = 0
    r: int = 64
    activation: str = "relu"
    scale: float = 1.0
    parallel: bool = False
    init_std: float | None = None
    phm_dim: int = 0
    phm_rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(Any, BottleneckType.BOTTLENECK)


def kronecker_sum(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x @ sum_i kron(A_i, left_i @ right_i) without building the matrix (Compacter, equations 4 and 5).

    x: (..., in), rule: A (n, n, n), left: (n, in / n, rank), right: (n, rank, out / n) -> (..., out).
    """
    terms = rule.shape[0]
    parts = x.unflatten(-1, (terms, -1))  # (..., a, in / n)
    narrow = torch.einsum("...ap,ipr->...iar", parts, left)
    mixed = torch.einsum("...iar,iab->...bir", narrow, rule)
    return torch.einsum("...bir,irq->...bq", mixed, right).flatten(-2)


class BottleneckLayer(WrapLayer):
    """The module with its adapters; those that are active at once are applied one after the other."""

    adapter_layer_names = (
        "bottleneck_down",
        "bottleneck_down_bias",
        "bottleneck_up",
        "bottleneck_up_bias",
        "bottleneck_down_right",
        "bottleneck_up_right",
        "bottleneck_rule",
    )
    other_param_names = ("bottleneck_settings",)
    bottleneck_rule: Any

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        for part in self.adapter_layer_names:
            setattr(self, part, nn.ParameterDict())
        self.bottleneck_settings: dict[str, tuple[str, float, bool]] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig, tuner: BottleneckModel) -> None:
        """Up-projection and biases start at zero, so that the model's outputs stay exactly as they are."""
        device = next(self.base_layer.parameters()).device
        make: dict[str, Any] = {"dtype": torch.float32, "device": device}
        width, r, terms, rank = config.hidden_size, config.r, config.phm_dim, config.phm_rank
        bound = 1 / math.sqrt(width)
        std = bound / math.sqrt(3) if config.init_std is None else config.init_std
        new: dict[str, Tensor] = {
            "bottleneck_down_bias": torch.zeros(r, **make),
            "bottleneck_up_bias": torch.zeros(width, **make),
        }
        if terms:
            # the entries of sum_i kron(A_i, B_i) get the standard deviation of a plain matrix: n * rank products
            size = (std**2 / (terms * rank)) ** (1 / 4)
            new["bottleneck_down"] = torch.randn(terms, width // terms, rank, **make) * size
            new["bottleneck_down_right"] = torch.randn(terms, rank, r // terms, **make) * size
            new["bottleneck_up"] = torch.randn(terms, r // terms, rank, **make) / math.sqrt(r)
            new["bottleneck_up_right"] = torch.zeros(terms, rank, width // terms, **make)
            self.bottleneck_rule[adapter_name] = tuner.shared_rule(adapter_name, terms, device)
        else:
            down = torch.empty(width, r, **make)
            new["bottleneck_down"] = (
                down.uniform_(-bound, bound)
                if config.init_std is None
                else nn.init.trunc_normal_(down, std=std, a=-2 * std, b=2 * std)
            )
            new["bottleneck_up"] = torch.zeros(r, width, **make)
        for part, tensor in new.items():
            parameters: Any = getattr(self, part)
            parameters[adapter_name] = nn.Parameter(tensor)
        self.bottleneck_settings[adapter_name] = (config.activation, config.scale, config.parallel)

    def adapter_output(self, x: Tensor, name: str) -> Tensor:
        """s * up(f(down(x))) in float32; x: (..., d)."""
        activation, scale, _ = self.bottleneck_settings[name]
        with torch.autocast(x.device.type, enabled=False):
            hidden = ACT2FN[activation](self._project(x.float(), name, "down"))
            return scale * self._project(hidden, name, "up")

    def _project(self, x: Tensor, name: str, which: str) -> Tensor:
        weight, bias = (getattr(self, f"bottleneck_{which}{part}")[name].float() for part in ("", "_bias"))
        if name not in self.bottleneck_rule:
            return x @ weight + bias
        right = getattr(self, f"bottleneck_{which}_right")[name].float()
        return kronecker_sum(x, self.bottleneck_rule[name].float(), weight, right) + bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in), the module's input; for a parallel adapter in = d."""
        y = self.base_layer(x, *args, **kwargs)
        for name in self.running():
            source = x if self.bottleneck_settings[name][2] else y
            y = (y + self.adapter_output(source, name)).to(y.dtype)
        return y


class BottleneckModel(WrapTuner):
    """Wraps the modules; Compacter's A_i are one parameter that all its layers hold."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def shared_rule(self, adapter_name: str, terms: int, device: torch.device) -> nn.Parameter:
        """A (n, n, n) of this adapter, normal with variance one; its first layer makes it."""
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer) and adapter_name in module.bottleneck_rule:
                return module.bottleneck_rule[adapter_name]
        rule = torch.randn(terms, terms, terms, dtype=torch.float32, device=device)
        return nn.Parameter(rule)


register_tuner(BottleneckType.BOTTLENECK, BottleneckConfig, BottleneckModel)

"""Settings of the bottleneck adapters; the algorithm is in bottleneck_tuner.py."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field
from torch import nn
from transformers.activations import ACT2FN

from compress_peft.adapters.base import ADAPTERS, Adapter
from compress_peft.adapters.bottleneck_tuner import BottleneckConfig
from compress_peft.adapters.targets import Sublayers, sublayers
from compress_peft.errors import ConfigError, ModelError, Problem, did_you_mean


def bottleneck_config(
    model: nn.Module, where: Literal["both", "mlp", "beside mlp"], **settings: Any
) -> BottleneckConfig:
    """peft's configuration for adapters after both sublayers, after the MLP, or beside it.

    Raises:
        ConfigError, ModelError: the activation is unknown, or the blocks do not have such sublayers.
    """
    activation = str(settings["activation"])
    if activation not in ACT2FN:
        what = f'unknown activation "{activation}"'
        raise ConfigError(Problem("activation", what, did_you_mean(activation, ACT2FN)))
    blocks: list[Sublayers] = sublayers(model)
    modules = [name for block in blocks for name in (block.attention_end, block.mlp_end)]
    if where == "mlp":
        modules = [block.mlp_end for block in blocks]
    elif where == "beside mlp":
        if any(not block.mlp for block in blocks):
            what = "the MLP is no module of its own, so that nothing can stand beside it"
            raise ModelError(Problem("adapter (parallel)", what, 'use "pfeiffer" or "houlsby"'))
        modules = [block.mlp for block in blocks]
    parallel = where == "beside mlp"
    return BottleneckConfig(
        task_type="CAUSAL_LM",
        modules=modules,
        hidden_size=blocks[0].hidden_size,
        parallel=parallel,
        **settings,
    )


@ADAPTERS.register
class Houlsby(Adapter):
    """Bottleneck adapters after attention and after the MLP of each block: 2 (2 d r + r + d) numbers a block.

    The up-projection starts at zero: the start is the identity exactly, where the paper has it nearly.
    """

    paper: ClassVar[str] = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751"

    method: Literal["houlsby"] = "houlsby"
    r: int = Field(default=64, ge=1, validation_alias=AliasChoices("r", "rank"))
    """Width of the bottleneck."""
    activation: str = "gelu"
    """By transformers' name."""
    init_std: float = Field(default=0.01, gt=0)
    """Of the down-projection: a normal distribution, cut at two standard deviations."""

    def peft_config(self, model: nn.Module) -> BottleneckConfig:
        return bottleneck_config(model, "both", **self.model_dump(exclude={"method"}))


@ADAPTERS.register
class Pfeiffer(Adapter):
    """One bottleneck adapter a block, after the MLP: 2 d r + r + d numbers a block."""

    paper: ClassVar[str] = "Pfeiffer et al. 2020, AdapterFusion, arXiv 2005.00247"

    method: Literal["pfeiffer"] = "pfeiffer"
    r: int = Field(default=64, ge=1, validation_alias=AliasChoices("r", "rank"))
    """Width of the bottleneck."""
    activation: str = "relu"
    """By transformers' name."""
    init_std: float = Field(default=0.01, gt=0)
    """Of the down-projection: a normal distribution, cut at two standard deviations."""

    def peft_config(self, model: nn.Module) -> BottleneckConfig:
        return bottleneck_config(model, "mlp", **self.model_dump(exclude={"method"}))


@ADAPTERS.register
class Parallel(Adapter):
    """Scaled parallel adapter: MLP(x) + s * up(f(down(x))), x the MLP's input: 2 d r + r + d numbers a block."""

    paper: ClassVar[str] = "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, 2110.04366"

    method: Literal["parallel"] = "parallel"
    r: int = Field(default=64, ge=1, validation_alias=AliasChoices("r", "rank"))
    """Width of the bottleneck."""
    activation: str = "relu"
    """By transformers' name."""
    scale: float = Field(default=4.0, gt=0)
    """s; the paper's is 4."""

    def peft_config(self, model: nn.Module) -> BottleneckConfig:
        return bottleneck_config(model, "beside mlp", **self.model_dump(exclude={"method"}))


@ADAPTERS.register
class Compacter(Adapter):
    """Houlsby's adapters whose two matrices are sum_i kron(A_i, B_i), i = 1..n, A_i (n, n), B_i of low rank.

    All layers share the A_i. Numbers: n^3 once, and for each of the two adapters of a block 2 k (d + r) + r + d, with
    k the rank of the B_i. The paper's has a random up-projection; here it starts at zero, and the model unchanged.
    """

    paper: ClassVar[str] = "Mahabadi et al. 2021, Compacter, arXiv 2106.04647, equations 4 and 5"

    method: Literal["compacter"] = "compacter"
    r: int = Field(default=64, ge=1)
    """Width of the bottleneck: a multiple of phm_dim."""
    phm_dim: int = Field(default=4, ge=1)
    """n: terms of the sum; must divide the hidden size too."""
    phm_rank: int = Field(default=1, ge=1, validation_alias=AliasChoices("phm_rank", "rank"))
    """Rank of the B_i."""
    activation: str = "gelu"
    """By transformers' name."""

    def peft_config(self, model: nn.Module) -> BottleneckConfig:
        hidden = sublayers(model)[0].hidden_size
        wrong = [f"{name} {size}" for name, size in (("r", self.r), ("hidden size", hidden)) if size % self.phm_dim]
        if wrong:
            what = f"{self.phm_dim} does not divide {' nor '.join(wrong)}"
            raise ConfigError(Problem("phm_dim", what, "choose a divisor of both"))
        return bottleneck_config(model, "both", **self.model_dump(exclude={"method"}))

    def estimate_parameters(self, model: nn.Module) -> int:
        """By the formula: on the meta device, where peft counts, the shared A_i would come apart."""
        self.checked_config(model)
        blocks = sublayers(model)
        each = 2 * self.phm_rank * (blocks[0].hidden_size + self.r) + self.r + blocks[0].hidden_size
        return self.phm_dim**3 + 2 * len(blocks) * each

"""LoRA by Hugging Face peft."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import LoraConfig
from pydantic import AliasChoices, Field
from torch import nn

from compress_peft.adapters.base import ADAPTERS, Adapter
from compress_peft.adapters.targets import target_layers


@ADAPTERS.register
class Lora(Adapter):
    """LoRA: W x + (alpha / r) B A x, with A (r, in) and B (out, r) trained."""

    paper: ClassVar[str] = (
        "Hu et al. 2021, LoRA, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; DoRA: Liu et al. 2024, "
        "arXiv 2402.09353"
    )
    merge_policies: ClassVar[tuple[str, ...]] = ("bundle", "dense")

    method: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, validation_alias=AliasChoices("r", "rank"))
    """Rank of the update."""
    lora_alpha: float = Field(default=16, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"))
    """The update is multiplied by lora_alpha / r, with use_rslora by lora_alpha / sqrt(r)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update, in training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Ends of names of linear layers, such as ["q_proj", "v_proj"]; or all linear layers of the blocks."""
    use_rslora: bool = False
    """Scale by the square root of the rank."""
    use_dora: bool = False
    """DoRA: train each row's length apart from its direction. Needs the dense weight."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How A starts; B starts at zero. (orthogonal: the rows of A and the columns of B are, and B A is zero.)"""

    def needs_dense(self) -> str:
        return "DoRA takes the norm of the dense weight's rows in every step" if self.use_dora else ""

    def peft_config(self, model: nn.Module) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=target_layers(model, self.target_modules),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init == "default" else self.init,
        )

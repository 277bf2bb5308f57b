"""(IA)3 by Hugging Face peft."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import IA3Config
from pydantic import model_validator
from torch import nn

from compress_peft.adapters.base import ADAPTERS, Adapter
from compress_peft.adapters.targets import target_layers


@ADAPTERS.register
class IA3(Adapter):
    """(IA)3: one trained vector a layer scales the outputs of keys and values and the input of down_proj."""

    paper: ClassVar[str] = "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning, arXiv 2205.05638"
    merge_policies: ClassVar[tuple[str, ...]] = ("bundle", "dense")

    method: Literal["ia3"] = "ia3"
    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Ends of names of the linear layers that are scaled."""
    feedforward_modules: tuple[str, ...] = ("down_proj",)
    """Those of target_modules that are scaled at their input instead of their output."""

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> IA3:
        extra = sorted(set(self.feedforward_modules) - set(self.target_modules))
        if extra:
            raise ValueError(f"feedforward_modules must be among target_modules; {', '.join(extra)} are not")
        return self

    def peft_config(self, model: nn.Module) -> IA3Config:
        feedforward = target_layers(model, self.feedforward_modules) if self.feedforward_modules else []
        targets = target_layers(model, self.target_modules)
        return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward)

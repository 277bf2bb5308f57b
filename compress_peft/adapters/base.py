"""What all adapters share: settings that attach a tuner of Hugging Face peft to a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from compress_peft.models.bundle import bare_backbone
from compress_peft.registry import Method, Registry


class Adapter(Method):
    """Settings of a parameter-efficient fine-tuning method; `peft_config` turns them into peft's."""

    method: str

    prompt_aware: ClassVar[bool] = False
    """Whether the model must be told where prompts end (compress_peft.models.prompts)."""

    merge_policies: ClassVar[tuple[str, ...]] = ("bundle",)
    """The merge policies that can take this adapter."""

    def peft_config(self, model: nn.Module) -> PeftConfig:
        """peft's settings for this model.

        Raises:
            ConfigError, ModelError: the settings name layers that the model does not have.
        """
        raise NotImplementedError

    def attach(self, model: nn.Module | PeftModel, adapter_name: str = "default") -> PeftModel:
        """The model with a new, active adapter in float32; everything else is frozen.

        A PeftModel gets one more adapter beside those that it has.

        Raises:
            ConfigError, ModelError: the settings do not fit the model; it is unchanged then.
        """
        if isinstance(model, PeftModel):
            with bare_backbone(model) as backbone:
                config = self.peft_config(backbone)
            model.add_adapter(adapter_name, config)
            model.set_adapter(adapter_name)
            return model
        return get_peft_model(model, self.peft_config(model), adapter_name=adapter_name)

    def parameter_counts(self, model: nn.Module) -> dict[str, int]:
        """What the report says of the adapted model: see `ParameterCount`."""
        return asdict(trainable_parameters(model))

    def estimate_parameters(self, model: nn.Module) -> int:
        """Number of parameters that would train; for a model on the meta device too. The model stays as it is.

        Raises:
            ConfigError, ModelError: the settings do not fit the model.
        """
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        adapted = get_peft_model(model, self.peft_config(model), low_cpu_mem_usage=True)
        count = trainable_parameters(adapted).trainable
        adapted.unload()
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        return count


ADAPTERS: Registry[Adapter] = Registry("adapter", "method")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: those that train, those of them that are no biases, and all of the model."""

    trainable: int
    trainable_without_bias: int
    total: int


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """Counts of `model`; a parameter with "bias" in the last two parts of its name is a bias."""
    trainable = without_bias = total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
            if not any("bias" in part for part in name.split(".")[-2:]):
                without_bias += parameter.numel()
    return ParameterCount(trainable, without_bias, total)

"""The bridge to transformers: after `import compress_peft`, `from_pretrained` reads folders with compressed weights.

config.json carries `quantization_config`: {"quant_method": "compress_peft", "weights": {parameter: spec}}. Without the
import, transformers does not know the method and stops at the packed shapes of the codes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress_peft.errors import CorruptFile, MissingRequirement, Problem
from compress_peft.models.faster_generate import faster_generate
from compress_peft.weights import CompressedWeight
from compress_peft.weights.compressed import dtype_name, stored_bits
from compress_peft.weights.inference import use_kernels
from compress_peft.weights.storage import Spec, join_weight, split_state_dict, stored_name

METHOD = "compress_peft"
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """weights: the spec of every compressed parameter, by its full name."""

    def __init__(
        self, weights: dict[str, Spec] | None = None, format_version: int = FORMAT_VERSION, quant_method: str = METHOD
    ):
        if format_version > FORMAT_VERSION:
            raise MissingRequirement(
                Problem(
                    "quantization_config.format_version",
                    f"the folder has version {format_version}, this compress_peft reads up to {FORMAT_VERSION}",
                    "upgrade compress_peft",
                )
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.weights = weights or {}


class JoinComponents(ConversionOps):
    """The stored tensors of one parameter -> its CompressedWeight; other parameters pass."""

    def __init__(self, hf_quantizer: CompressedQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None and full_layer_name is not None
        found = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        wanted = model.get_parameter_or_buffer(full_layer_name).dtype
        spec = self.hf_quantizer.spec_of(model, full_layer_name)
        if spec is None:
            # Tensors that pass through a converter are not cast by transformers.
            return {k: v.to(wanted) if v.is_floating_point() else v for k, v in found.items()}
        named = {full_layer_name.removesuffix("weight") + key: value for key, value in found.items()}
        weight = join_weight(full_layer_name, dict(spec, dtype=dtype_name(wanted)), named)
        module, _ = get_module_from_name(model, full_layer_name)
        module._is_hf_initialized = True
        return {"weight": nn.Parameter(weight, requires_grad=False)}


@register_quantizer(METHOD)
class CompressedQuantizer(HfQuantizer):
    """Loads, saves and reports models with CompressedWeight parameters. It does not quantize."""

    requires_calibration = True  # transformers then refuses `quantization_config=` for a dense checkpoint
    quantization_config: CompressedConfig

    def spec_of(self, model: PreTrainedModel, name: str) -> Spec | None:
        """The spec of a parameter, also when the model is loaded without its head (or with it)."""
        prefix = model.base_model_prefix + "."
        weights = self.quantization_config.weights
        return weights.get(name) or weights.get(prefix + name) or weights.get(name.removeprefix(prefix))

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Every name under which some grid stores a part of `weight`."""
        names = {"weight"}
        for kind in CompressedWeight._kinds.values():
            names.update(stored_name("weight", component, kind) for component in kind.component_names)
        return {"weight": sorted(names)}

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": JoinComponents}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self.spec_of(model, param_name) is not None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        spec = self.spec_of(model, param_name)
        return stored_bits(spec) / 8 if spec is not None else param.element_size()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        dense = [
            name
            for name, parameter in model.named_parameters()
            if self.spec_of(model, name) is not None and not isinstance(parameter, CompressedWeight)
        ]
        if dense:
            what, fix = "compressed according to config.json, but not in the files", "get the folder again"
            raise CorruptFile([Problem(name, what, fix) for name in dense])
        use_kernels(model)
        faster_generate(model)
        # The flag makes `.float()` and `.half()` raise; here they only change the logical dtype.
        model.is_quantized = False
        # Saving splits the weights itself (`get_state_dict_and_metadata`), so there is nothing to revert.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not (
                isinstance(conversion, WeightConverter)
                and any(isinstance(operation, JoinComponents) for operation in conversion.operations)
            )
        ]
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes; the specs go into config.json, which is written after this call."""
        tensors, specs = split_state_dict(model)
        self.quantization_config.weights = specs
        model.config.quantization_config = self.quantization_config
        return tensors, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: nn.Module) -> None:
    """Make `model.save_pretrained` write the compressed weights of this model, or stop doing so if it has none.

    Models that are not of transformers are left alone.
    """
    if not isinstance(model, PreTrainedModel):
        return
    specs = split_state_dict(model)[1]
    if specs:
        quantizer = CompressedQuantizer(CompressedConfig(specs), pre_quantized=True)
        model.hf_quantizer = quantizer
        model.config.quantization_config = quantizer.quantization_config
    elif isinstance(getattr(model, "hf_quantizer", None), CompressedQuantizer):
        model.hf_quantizer.remove_quantization_config(model)

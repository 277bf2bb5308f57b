"""PARA in one decoder block (Liu et al., 2025, "Prompt Aware Representation Adjustment", equations 3-6).

    hidden (batch, T, d) -- position prompt_end --> h (batch, d)
    l = gelu(h W_down) W_up + b                     W_down (d, r), W_up (r, q + v + u), b (q + v + u,)
    l_q, l_v, l_u = split(l)
    q_proj(x) * l_q     v_proj(x) * l_v     up_proj(x) * l_u

The vectors are made once per request, from the hidden state of the prompt's last token at the input of each block,
and kept in that block's layer of the key/value cache; they live and die with the cache. A cache therefore belongs
to one request: its vectors are those of the prompt that filled it first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from compress_peft.errors import ConfigError, DataError, ModelError, Problem
from compress_peft.models.prompts import NO_PROMPT
from compress_peft.weights.blocks import OutputScaler

SCALED = ("q_proj", "v_proj", "up_proj")
"""The linear layers of a block whose outputs are multiplied, in the order of the split of eq. 6."""

CANNOT_MERGE = Problem(
    "PARA",
    "its vectors depend on the prompt, so no weights are equal to it and peft cannot merge it",
    'use the merge policy "bundle" (exact: backbone and adapter in one folder) or "static" (mean vectors)',
)


class ParaType(enum.StrEnum):
    """The peft type; peft's own enum is closed, but its tables take any string."""

    PARA = "PARA"


@dataclass
class ParaConfig(PeftConfig):
    """What peft saves as adapter_config.json.

    r: width of the bottleneck. activation: a name of transformers' table. init_std: of W_down's normal distribution.
    layers: numbers of the blocks that get a generator; None for all. target_modules is not used: peft asks for it.
    """

    r: int = 12
    activation: str = "gelu"
    init_std: float = 0.02
    layers: list[int] | None = None
    target_modules: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ParaType.PARA


def scaled_linears(name: str, block: nn.Module) -> tuple[dict[str, tuple[str, nn.Module]], list[Problem]]:
    """The block's q_proj, v_proj and up_proj: {role: (name inside the block, module)}, and what is wrong."""
    found: dict[str, list[tuple[str, nn.Module]]] = {role: [] for role in SCALED}
    for path, module in block.named_modules():
        role = path.rpartition(".")[2]
        if role in found:
            found[role].append((path, module))
    problems = []
    for role, modules in found.items():
        if len(modules) != 1:
            what = f"expected one {role}, found {len(modules)}"
            problems.append(Problem(name, what, "PARA needs blocks with separate q_proj, v_proj and up_proj"))
        elif not hasattr(modules[0][1], "out_features"):
            what = f"{role} is a {type(modules[0][1]).__name__}, expected a linear layer"
            problems.append(Problem(name, what, "attach PARA to a model whose projections are linear layers"))
    return {role: modules[0] for role, modules in found.items() if modules}, problems


class ParaLayer(GradientCheckpointingLayer, BaseTunerLayer, OutputScaler):
    """A decoder block with its vector generators, one for each named adapter.

    It is checkpointed in place of the block, so that a recomputation makes the vectors again.
    """

    adapter_layer_names = ("para_down", "para_up", "para_bias")
    other_param_names = ("para_activation",)
    base_layer: Any

    def __init__(self, block: nn.Module, index: int, linears: dict[str, tuple[str, Any]]):
        super().__init__()
        self.base_layer = block
        self.index = index
        self.scaled_names = {role: path for role, (path, _) in linears.items()}
        modules = [linears[role][1] for role in SCALED]
        self.hidden_size: int = modules[0].in_features
        self.widths: list[int] = [module.out_features for module in modules]
        self.para_down = nn.ParameterDict()
        self.para_up = nn.ParameterDict()
        self.para_bias = nn.ParameterDict()
        self.para_activation: dict[str, str] = {}
        self.gradient_checkpointing = getattr(block, "gradient_checkpointing", False)
        if hasattr(block, "_gradient_checkpointing_func"):
            self._gradient_checkpointing_func = block._gradient_checkpointing_func
        self._current: list[tuple[Tensor, ...]] = []
        """While the block runs: the vectors of its three layers. A list, since setting a module's attribute is slow."""
        # In place of `forward`, and not as hooks: a module with a hook takes a slower way, which while decoding costs
        # as much as all the rest of PARA.
        self._scaled = modules
        self._replaced = [vars(module).get("forward") for module in modules]
        self._plain = [module.forward for module in modules]
        for module, scaled in zip(modules, (self._query, self._value, self._up), strict=True):
            module.forward = scaled

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: ParaConfig, inference_mode: bool = False) -> None:
        """Adds a generator in float32: W_down normal, W_up zero, b one, so that all vectors are exactly one."""
        device = next(self.base_layer.parameters()).device
        make: dict[str, Any] = dict(dtype=torch.float32, device=device)
        width = sum(self.widths)
        self.para_down[adapter_name] = nn.Parameter(torch.randn(self.hidden_size, config.r, **make) * config.init_std)
        self.para_up[adapter_name] = nn.Parameter(torch.zeros(config.r, width, **make))
        self.para_bias[adapter_name] = nn.Parameter(torch.ones(width, **make))
        self.para_activation[adapter_name] = config.activation
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if len(names) > 1:
            what = f"{len(names)} adapters are active at once: {', '.join(names)}"
            raise ConfigError(Problem("PARA", what, "activate one: model.set_adapter(name)"))
        super().set_adapter(names, inference_mode=inference_mode)

    @property
    def generator(self) -> str | None:
        """Name of the adapter whose generator runs in this block now; None when there is none."""
        if self._disable_adapters:
            return None
        generators: Any = self._modules["para_down"]  # at every token, so not by way of __getattr__
        for name in self.active_adapters:
            if name in generators:
                return name
        return None

    def make_vectors(self, hidden_states: Tensor, prompt_end: Tensor, name: str) -> Tensor:
        """Eq. 6. hidden_states (batch, T, d) at the block's input, prompt_end (batch,) -> (batch, q + v + u).

        A row without a prompt pools zero, so that its vectors are b: what the adapter has learned for all prompts.
        (Its first token would be no substitute: in many models it has a hidden state hundreds of times larger than
        any other, an attention sink, and the vectors made of it are far from all that training has seen.)
        """
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        activation = ACT2FN[self.para_activation[name]]
        with torch.autocast(hidden_states.device.type, enabled=False):
            end = prompt_end.to(hidden_states.device)
            pooled = hidden_states[rows, end.clamp(min=0)].float() * end.ne(NO_PROMPT)[:, None]
            down, up, bias = (part[name].float() for part in (self.para_down, self.para_up, self.para_bias))
            return activation(pooled @ down) @ up + bias

    def forward(
        self, hidden_states: Tensor, *args: Any, prompt_end: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, ...]:
        """hidden_states: (batch, T, d). prompt_end: (batch,), or None where the cache holds the vectors."""
        block: Any = self._modules["base_layer"]
        if getattr(block, "gradient_checkpointing", False):
            block.gradient_checkpointing = False  # this wrapper is the checkpoint
        name = self.generator
        if name is None:
            return block(hidden_states, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if prompt_end is None:
            vectors, parts = None, self._cached_vectors(cache, name, hidden_states.shape[0])
        else:
            vectors = self.make_vectors(hidden_states, prompt_end, name)
            parts = self._of_each_layer(vectors)
        self._current.append(parts)
        try:
            output = block(hidden_states, *args, **kwargs)
        finally:
            self._current.clear()
        if cache is not None and vectors is not None:  # after the block: some caches make layers on the first update
            cache.layers[self.index].para_vectors = {name: vectors}
        return output

    def _of_each_layer(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """(batch, q + v + u) -> those of the three layers, (batch, 1, q), (batch, 1, v) and (batch, 1, u)."""
        return vectors[:, None].split(self.widths, dim=-1)

    def _cached_vectors(self, cache: Any, name: str, batch: int) -> tuple[Tensor, ...]:
        """What `_of_each_layer` gives for the vectors in the cache; it is kept there too, for the next token."""
        if cache is None:
            what = "no prompt_end has arrived at this block"
            fix = "call the causal language model itself, of a kind that passes unknown keywords on to its blocks"
            raise ModelError(Problem(f"block {self.index}", what, fix))
        layer: Any = cache.layers[self.index] if self.index < len(cache.layers) else None
        stored = getattr(layer, "para_vectors", {})
        ready = getattr(layer, "para_ready", None)
        if ready is not None and ready[0] is stored.get(name) and ready[1] == batch:
            return ready[2]
        if name not in stored:
            what = f'the cache was filled without the vectors of the adapter "{name}"'
            fix = "start each request with an empty cache, and keep the adapter that filled it"
            raise DataError(Problem("past_key_values", what, fix))
        vectors = stored[name]  # (rows when the prompt was processed, q + v + u)
        if batch % vectors.shape[0]:
            what = f"the cache was filled by {vectors.shape[0]} rows and is used by {batch}"
            raise DataError(Problem("past_key_values", what, "repeat whole rows (batch_repeat_interleave)"))
        split = self._of_each_layer(vectors.repeat_interleave(batch // vectors.shape[0], dim=0))
        layer.para_ready = (vectors, batch, split)
        return split

    def _query(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self._plain[0](*args, **kwargs)
        return _times(output, self._current[0][0]) if self._current else output

    def _value(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self._plain[1](*args, **kwargs)
        return _times(output, self._current[0][1]) if self._current else output

    def _up(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self._plain[2](*args, **kwargs)
        return _times(output, self._current[0][2]) if self._current else output

    def former_forward(self, layer: nn.Module) -> Any:
        return self._plain[self._scaled.index(layer)]

    def output_scale(self, layer: nn.Module) -> Tensor | None:
        return self._current[0][self._scaled.index(layer)] if self._current else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ConfigError(CANNOT_MERGE)

    def release(self) -> None:
        """Leaves the block as it was before."""
        for module, before in zip(self._scaled, self._replaced, strict=True):
            del module.forward
            if before is not None:  # not the class's own
                module.forward = before
        if hasattr(self.base_layer, "gradient_checkpointing"):
            self.base_layer.gradient_checkpointing = self.gradient_checkpointing


def _times(output: Tensor, vector: Tensor) -> Tensor:
    """The product in float32, in the output's dtype; without gradients in the memory of `output`, which is new."""
    return (output * vector).to(output.dtype) if torch.is_grad_enabled() else output.mul_(vector)

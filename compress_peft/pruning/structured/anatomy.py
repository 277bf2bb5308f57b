"""What of a decoder block goes together when it gets narrower."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.layers import decoder_layers
from compress_peft.weights import CompressedWeight

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("up_proj", "down_proj")


@dataclass(frozen=True)
class Parts:
    """The linear layers of one block. A key/value group is one head of k and v with the query heads that read it."""

    name: str
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear
    groups: int

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        """Those whose rows are MLP channels."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def channels(self) -> int:
        return self.up.out_features

    @property
    def layers(self) -> tuple[nn.Linear, ...]:
        return (self.q, self.k, self.v, self.o, *self.readers, self.down)


def anatomy(model: nn.Module) -> list[Parts]:
    """The blocks in order.

    Raises:
        ModelError: blocks without separate q_proj, k_proj, v_proj, o_proj, up_proj and down_proj (fused projections,
            mixtures of experts), or with compressed or adapted layers; all are named.
    """
    if getattr(model, "peft_config", None):
        raise ModelError(Problem(type(model).__name__, "has an adapter", "merge it first, or shrink before finetune"))
    found, problems = [], []
    heads = model.config.get_text_config().num_key_value_heads  # type: ignore[union-attr,operator]
    for name, block in decoder_layers(model):
        attention, mlp = _owner(block, ATTENTION), _owner(block, MLP)
        if attention is None or mlp is None:
            what = f"has no one module with {', '.join(ATTENTION if attention is None else MLP)} (nn.Linear)"
            problems.append(Problem(name, what, "use shortgpt, which drops whole blocks, or prune single weights"))
            continue
        q, k, v, o = (getattr(attention, key) for key in ATTENTION)
        gate = getattr(mlp, "gate_proj", None)
        parts = Parts(name, q, k, v, o, gate, mlp.up_proj, mlp.down_proj, heads)  # type: ignore[arg-type]
        if any(isinstance(layer.weight, CompressedWeight) for layer in parts.layers):
            problems.append(Problem(name, "is compressed already", "shrink the original model, then quantize it"))
        found.append(parts)
    if problems:
        raise ModelError(problems)
    return found


def _owner(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    owners = [m for m in block.modules() if all(isinstance(getattr(m, name, None), nn.Linear) for name in names)]
    return owners[0] if len(owners) == 1 else None

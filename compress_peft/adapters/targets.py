"""Choosing the linear layers that an adapter attaches to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from compress_peft.errors import ConfigError, ModelError, Problem, did_you_mean
from compress_peft.models.layers import decoder_layers, linear_layers

Targets = tuple[str, ...]


def target_layers(model: nn.Module, targets: str | Targets, key: str = "target_modules") -> list[str]:
    """Full names of the chosen linear layers inside the decoder blocks.

    targets: "all-linear", or the ends of names, such as "q_proj" or "mlp.up_proj".

    Raises:
        ConfigError: an entry that matches no layer.
    """
    names = [name for name, _ in linear_layers(model)]
    if targets == "all-linear":
        return names
    if isinstance(targets, str):
        raise ConfigError(Problem(key, f'"{targets}" is neither a list nor "all-linear"', f'write ["{targets}"]'))
    chosen = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    known = {name.rpartition(".")[2] for name in names}
    problems = [
        Problem(f"{key}[{index}]", f'"{target}" matches no linear layer of the blocks', did_you_mean(target, known))
        for index, target in enumerate(targets)
        if not chosen[target]
    ]
    if not targets:
        problems = [Problem(key, "the list is empty", f'use "all-linear" or some of: {", ".join(sorted(known))}')]
    if problems:
        raise ConfigError(problems)
    wanted = {name for matches in chosen.values() for name in matches}
    return [name for name in names if name in wanted]


def check_inputs(model: nn.Module, targets: str | Targets, key: str, size: int) -> None:
    """Whether `size` divides the inputs of all chosen layers (peft would take another size instead).

    Raises:
        ConfigError: it does not, with the layers.
    """
    layers = [(name, model.get_submodule(name).in_features) for name in target_layers(model, targets)]
    wrong = [f"{name} ({inputs})" for name, inputs in layers if int(inputs) % size]  # type: ignore[arg-type]
    if wrong:
        what = f"{size} does not divide the inputs of {len(wrong)} layers: {', '.join(wrong[:3])}"
        raise ConfigError(Problem(key, what, "choose a divisor, or other target_modules"))


def widths(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, which in GPT-2 is a Conv1D with a weight (inputs, outputs)."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


@dataclass(frozen=True)
class Sublayers:
    """Names of linear layers in one block, whose own name is `block`.

    attention_end, mlp_end: the last ones. attention_inputs, mlp_inputs: the others. hidden_size: d.
    """

    block: str
    attention_end: str
    mlp_end: str
    attention_inputs: tuple[str, ...]
    mlp_inputs: tuple[str, ...]
    hidden_size: int

    @property
    def mlp_start(self) -> str:
        """The MLP's first linear layer, whose input is the MLP's."""
        return (*self.mlp_inputs, self.mlp_end)[0]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.attention_inputs, self.attention_end, *self.mlp_inputs, self.mlp_end)

    def inputs_like(self, *initials: str) -> list[str]:
        """Of the attention's inputs, those whose names start so ("q", "v"); a fused one is like all of them."""
        if len(self.attention_inputs) == 1:
            return list(self.attention_inputs)
        return [name for name in self.attention_inputs if name.rpartition(".")[2].startswith(initials)]


def sublayers(model: nn.Module) -> list[Sublayers]:
    """The two sublayers of every block, by structure: the child with "att" in its name, and all other linear layers.

    Raises:
        ModelError: blocks with other parts than one attention and one MLP, or with several experts.
    """
    found, problems = [], []
    for root, block in decoder_layers(model):
        groups: dict[str, list[tuple[str, nn.Module]]] = {}
        for child, module in block.named_children():
            inside = module.named_modules(prefix=f"{root}.{child}")
            linears = [(name, linear) for name, linear in inside if isinstance(linear, nn.Linear | Conv1D)]
            if linears:
                groups.setdefault("" if isinstance(module, nn.Linear | Conv1D) else child, []).extend(linears)
        attention = [child for child in groups if "att" in child.lower()]
        others = [child for child in groups if child not in attention]
        names = ", ".join(child or "(linear layers of the block)" for child in groups) or "none"
        if len(attention) != 1 or len(others) != 1:
            what = f"expected one attention and one MLP; parts with linear layers: {names}"
            problems.append(Problem(root, what, "use an adapter for single layers, such as lora"))
            continue
        second, hidden = groups[others[0]][-1][0], widths(groups[others[0]][-1][1])[1]
        ends = [name for name, layer in groups[attention[0]] if widths(layer)[1] == hidden]
        mlp = f"{root}.{others[0]}" if others[0] else ""
        lists = mlp and any(isinstance(part, nn.ModuleList) for part in model.get_submodule(mlp).modules())
        if lists or not ends:
            what = f"the MLP does not end in one projection to the hidden size (its last linear layer is {second})"
            problems.append(Problem(root, what, "use an adapter for single layers, such as lora"))
            continue
        inputs = tuple(name for name, _ in groups[attention[0]] if name != ends[-1])
        beside = tuple(name for name, _ in groups[others[0]][:-1])
        found.append(Sublayers(root, ends[-1], second, inputs, beside, hidden))
    if problems:
        raise ModelError(problems)
    return found

"""Choosing the linear layers that an adapter attaches to."""

from __future__ import annotations

from torch import nn

from compress_peft.errors import ConfigError, Problem, did_you_mean
from compress_peft.models.layers import linear_layers

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

"""Which linear layers of a block can be scaled against what comes before them, found by trying it on the block itself.

    x -> norm -> linear layers        norm.weight / s,         weight[:, j] * s[j]
    linear ... * ... -> linear        source weight[i] / s[i], weight[:, j] * s[i], output i of the source feeds input j

No architecture is named: a pass with hooks shows what feeds what, and a grouping counts only if the block computes the
same with powers of two as scales, which shift no bit. So a norm whose output also goes elsewhere (BLOOM's residual), or
a layer behind a function that does not pass factors on (GELU), is left out, while a ReLU or a gate is passed through.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft.models.processes import current
from compress_peft.models.walk import BlockTurn
from compress_peft.weights import CompressedWeight

Run = Callable[[], Tensor]
"""The block's output for one chunk of inputs."""

BASE = 64
"""Channels are numbered in this base, by factors 2 ** digit: every float dtype but float16 has the range."""

TOLERANCE = 1e-3
"""Of the change of a token's output, relative to what the block adds to the token; more where the dtype is coarser."""


@dataclass(frozen=True)
class Grouping:
    """Linear layers with one input, and what produces it."""

    source: str
    """Full name of a norm, or of a linear layer."""
    module: nn.Module
    targets: dict[str, nn.Linear]
    """By full name: all layers with this input, also those that are not to be quantized."""
    index: Tensor
    """int64 (in,), on the device of the weights: the source's output channel behind each input channel."""
    offset: float = 0.0
    """What a norm adds to its weight: 1 in Gemma's."""

    def apply(self, scales: Tensor) -> None:
        """Divide the source's channels by scales, (source's outputs,), and multiply the targets' columns by them.

        Every changed parameter becomes a new one, so that whoever holds the old one keeps it as it is.
        """
        rows = isinstance(self.module, nn.Linear)
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        exact = scales.to(weight.device, torch.float64)
        _replace(self.module, "weight", (weight.double() + self.offset) / (exact[:, None] if rows else exact), self)
        if isinstance(bias := getattr(self.module, "bias", None), Tensor):
            _replace(self.module, "bias", bias.double() / exact)
        for layer in self.targets.values():
            _replace(layer, "weight", layer.weight.double() * exact[self.index])

    def within(self, block: str) -> Layout:
        """block: the full name of the block."""
        inside = len(block) + 1
        return Layout(self.source[inside:], tuple(name[inside:] for name in self.targets), self.index, self.offset)

    def key(self) -> tuple[Any, ...]:
        """Equal for equal groupings in different processes."""
        return self.source, tuple(self.targets), tuple(self.index.tolist()), self.offset

    def parameters(self) -> list[str]:
        """Full names of what `apply` replaces."""
        return [f"{self.source}.weight", f"{self.source}.bias", *(f"{name}.weight" for name in self.targets)]


@dataclass(frozen=True)
class Layout:
    """A grouping by names inside its block, by which the next block's is found."""

    source: str
    targets: tuple[str, ...]
    index: Tensor
    offset: float

    def grouping(self, turn: BlockTurn) -> Grouping | None:
        """The same in this block, if it has such layers; whether it holds is another question."""
        modules = dict(turn.block.named_modules())
        source = modules.get(self.source)
        weight = getattr(source, "weight", None)
        targets = {f"{turn.name}.{name}": modules.get(name) for name in self.targets}
        if source is None or not isinstance(weight, Tensor) or weight.shape[0] <= int(self.index.max()):
            return None
        linears = {name: layer for name, layer in targets.items() if isinstance(layer, nn.Linear)}
        if len(linears) < len(targets) or any(layer.in_features != len(self.index) for layer in linears.values()):
            return None
        return Grouping(f"{turn.name}.{self.source}", source, linears, self.index.to(weight.device), self.offset)


def _replace(module: nn.Module, name: str, value: Tensor, grouping: Grouping | None = None) -> None:
    old = getattr(module, name)
    value = value - grouping.offset if grouping is not None else value
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


@torch.no_grad()
def find_groupings(turn: BlockTurn, shared: Container[str]) -> tuple[list[Grouping], dict[str, str]]:
    """The groupings that hold for the block, in the order of its calls; and why for the other layers there is none.

    shared: full names of parameters that stand at several places of the model, which are not touched. Groupings
    without a layer in `turn.layers` are left out. Those of the block before are tried first, all in one pass.
    """
    chunk = turn.inputs[0]

    def run() -> Tensor:
        return turn.run(chunk)

    calls, base = _trace(turn, run)
    linears = [(name, module) for name, module, _, _ in calls if isinstance(module, nn.Linear)]
    groups: dict[tuple[str, ...], tuple[tuple[int, int], dict[str, nn.Linear]]] = {}
    for key, members in itertools.groupby(_by_input(calls), key=lambda item: item[0]):
        targets = {name: module for _, name, module in members}
        if any(name in turn.layers for name in targets):
            groups[tuple(targets)] = key, targets
    former = [layout.grouping(turn) for layout in turn.memory.get("groupings", ())]
    likely = {names: g for g in former if g and (names := tuple(g.targets)) in groups and not _untouchable(g, shared)}
    # Of inputs that are always zero a search finds less than was known: resumed here, a walk would go another way.
    silent = {name for name, _, given, _ in calls if not (given != 0).flatten(0, -2).any(0).all()}
    likely = {names: g for names, g in likely.items() if not (isinstance(g.module, nn.Linear) and silent & {*names})}
    if likely and not _hold(list(likely.values()), run, chunk, base):
        likely = {}
    found: list[Grouping] = []
    reasons: dict[str, str] = {}
    for names, (key, targets) in groups.items():
        if names in likely:
            found.append(likely[names])
            continue
        norms = [
            (name, module)
            for name, module, _, output in calls
            if not isinstance(module, nn.Linear) and _place(output) == key and _per_channel(module, targets)
        ]
        first = [name for name, _ in linears].index(names[0])
        candidates = _from_norm(norms, targets) if norms else _from_linear(linears[:first][::-1], targets, run)
        reason = "its input comes neither from a norm's weight nor from the outputs of one linear layer"
        for grouping in candidates:
            if why := _untouchable(grouping, shared):
                reason = why
            elif _hold([grouping], run, chunk, base):
                found.append(grouping)
                break
            else:
                reason = f"scaling {grouping.source} against it changes what the block computes"
        else:
            reasons |= {name: reason for name in targets if name in turn.layers}
    turn.memory["groupings"] = [grouping.within(turn.name) for grouping in found]
    return _agreed(found, reasons, turn)


def _untouchable(grouping: Grouping, shared: Container[str]) -> str:
    """Why nobody may change these weights, if so."""
    if any(isinstance(layer.weight, CompressedWeight) for layer in grouping.targets.values()):
        return "its weight is quantized already"
    if any(name in shared for name in grouping.parameters()):
        return f"its weight or that of {grouping.source} is shared with another place of the model"
    return ""


def _agreed(found: list[Grouping], reasons: dict[str, str], turn: BlockTurn) -> tuple[list[Grouping], dict[str, str]]:
    """What holds for the calibration of every process that shares the walk."""
    keys = [grouping.key() for grouping in found]
    common = set(keys).intersection(*current().gather(keys))
    for grouping, key in zip(found, keys, strict=True):
        if key not in common:
            why = "it cannot be scaled on the calibration of another process"
            reasons |= {name: why for name in grouping.targets if name in turn.layers}
    return [grouping for grouping, key in zip(found, keys, strict=True) if key in common], reasons


Call = tuple[str, nn.Module, Tensor, Tensor]


def _trace(turn: BlockTurn, run: Run) -> tuple[list[Call], Tensor]:
    """(full name, module, input, output) of every call of a module with a weight in one pass; the block's output."""
    calls: list[Call] = []
    hooks = []
    for name, module in turn.block.named_modules(prefix=turn.name):
        if not isinstance(module._parameters.get("weight"), Tensor):
            continue

        def hook(module: nn.Module, given: tuple, output: Tensor, name: str = name) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, module, given[0], output))

        hooks.append(module.register_forward_hook(hook))
    try:
        base = run()
    finally:
        for handle in hooks:
            handle.remove()
    return calls, base


def _place(tensor: Tensor) -> tuple[int, int]:
    """Equal for a tensor and its views of the same size; held tensors have places of their own."""
    return tensor.data_ptr(), tensor.numel()


def _by_input(calls: list[Call]) -> list[tuple[tuple[int, int], str, nn.Linear]]:
    """(place of the input, name, layer), layers with the same input together, in the order of the first call."""
    groups: dict[tuple[int, int], list[tuple[tuple[int, int], str, nn.Linear]]] = {}
    for name, module, given, _ in calls:
        if isinstance(module, nn.Linear):
            groups.setdefault(_place(given), []).append((_place(given), name, module))
    return [item for group in groups.values() for item in group]


def _per_channel(module: nn.Module, targets: dict[str, nn.Linear]) -> bool:
    weight = module.weight
    return isinstance(weight, Tensor) and weight.shape == (next(iter(targets.values())).in_features,)


def _from_norm(norms: list[tuple[str, nn.Module]], targets: dict[str, nn.Linear]) -> Iterator[Grouping]:
    for name, module in norms:
        layer = next(iter(targets.values()))
        index = torch.arange(layer.in_features, device=layer.weight.device)
        for offset in (0.0, 1.0):
            yield Grouping(name, module, targets, index, offset)


def _from_linear(before: list[tuple[str, nn.Linear]], targets: dict[str, nn.Linear], run: Run) -> Iterator[Grouping]:
    for name, module in before:
        index = _channels(module, next(iter(targets.values())), run)
        if index is not None:
            yield Grouping(name, module, targets, index)


def _channels(source: nn.Linear, target: nn.Linear, run: Run) -> Tensor | None:
    """Which output of source each input of target is proportional to, int64 (in,); None if they are not.

    Inputs that are always zero say nothing; where widths are equal and all others go straight, these do too.
    """
    outputs, inputs = source.out_features, target.in_features
    if outputs > inputs or inputs % outputs or isinstance(source.weight, CompressedWeight):
        return None
    before = _input_of(target, run)
    power = before.square().sum(0)
    live = power > 0
    index = torch.zeros(inputs, dtype=torch.int64, device=before.device)
    unit = 1
    while unit < outputs:
        digits = torch.arange(outputs, device=before.device) // unit % BASE
        with _scaled_rows(source, 2.0 ** (digits - BASE // 2).double()):
            after = _input_of(target, run)
        ratio = (before * after).sum(0) / power
        digit = torch.log2(ratio) + BASE // 2
        straight = (after - ratio * before).abs().amax(0) <= 1e-2 * ratio * before.abs().amax(0)
        whole = ((digit - digit.round()).abs() < 1e-2) & (digit.round() >= 0) & (digit.round() < BASE)
        if not live.any() or not (straight & whole)[live].all():  # NaN is not straight either
            return None
        index += torch.where(live, digit, 0.0).round().long() * unit
        unit *= BASE
    if not live.all():
        own = torch.arange(inputs, device=index.device)
        if outputs != inputs or not torch.equal(index[live], own[live]):
            return None
        index = own
    return index if int(index.max()) < outputs else None


def _input_of(layer: nn.Linear, run: Run) -> Tensor:
    """(tokens, in) float64."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[0].flatten(0, -2).double()


@contextmanager
def _scaled_rows(layer: nn.Linear, factors: Tensor) -> Iterator[None]:
    with _restoring([layer]):
        for name, column in (("weight", factors[:, None]), ("bias", factors)):
            value = getattr(layer, name)
            if value is not None:
                _replace(layer, name, value.double() * column)
        yield


@contextmanager
def _restoring(modules: list[nn.Module]) -> Iterator[None]:
    """The modules get their parameters back, the same objects."""
    held = [dict(module._parameters) for module in modules]
    try:
        yield
    finally:
        for module, parameters in zip(modules, held, strict=True):
            module._parameters.update(parameters)


def _hold(groupings: list[Grouping], run: Run, chunk: Tensor, base: Tensor) -> bool:
    """Whether the block's output base for chunk stays the same, token by token, with all of them scaled."""
    generator = torch.Generator().manual_seed(0)
    before, eps = base.double(), 0.0
    with _restoring([module for grouping in groupings for module in (grouping.module, *grouping.targets.values())]):
        for grouping in groupings:
            weight = grouping.module.weight
            assert isinstance(weight, Tensor)
            eps = max(eps, torch.finfo(weight.dtype).eps)
            grouping.apply(2.0 ** torch.randint(-2, 3, (weight.shape[0],), generator=generator))
        change = (run().double() - before).norm(dim=-1)
    added = (before - chunk.double()).norm(dim=-1)
    return bool((change <= max(TOLERANCE, 8 * eps) * added + eps * before.norm(dim=-1)).all())

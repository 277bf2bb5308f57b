"""What a layer's inputs look like over a calibration text: sums, norms, Hessians, gathered by hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.processes import ALONE, Processes
from compress_peft.tensors.sweep import add_gram, mirror

NEEDS = ("inputs", "targets", "norms", "largest", "hessian", "drift")
"""What a consumer may ask for; "inputs" and "targets" alone spare the pass for statistics, "norms" (or nothing) gives
only what is always there."""


@dataclass
class InputStatistics:
    """What calibration showed of the inputs of a layer; one object for all layers that share their input."""

    hessian: Tensor | None = None
    """X^T X over all tokens, float32 (in, in); None where nobody asked for it."""
    tokens: int = 0
    """Rows of X: the tokens that reached the layer."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of them, in words."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """For what a method derives from the statistics and wants again at the next layer that shares them."""
    square_sum: Tensor = field(default_factory=lambda: torch.empty(0))
    """The sum of the squares of each input, float32 (in,): the diagonal of the Hessian. Always there."""
    sum: Tensor = field(default_factory=lambda: torch.empty(0))
    """The sum of each input, float32 (in,). Always there when a walk made the statistics."""
    drift: Tensor | None = None
    """(X_original - X)^T X over all tokens, float32 (in, in), with X_original the layer's inputs in the unchanged model
    on the same text; None where nobody asked for it."""
    largest: Tensor | None = None
    """The largest magnitude of each input, float32 (in,); None where nobody asked for it."""

    def __post_init__(self) -> None:
        if self.hessian is not None and not self.square_sum.numel():
            self.square_sum = self.hessian.diagonal().clone()

    def divide(self, scales: Tensor) -> None:
        """Make them those of the inputs divided by scales, positive (in,)."""
        for name in ("hessian", "drift"):
            matrix = getattr(self, name)
            if matrix is not None:
                setattr(self, name, matrix / scales / scales[:, None])
        self.square_sum = self.square_sum / scales.square()
        self.sum = self.sum / scales
        self.largest = None if self.largest is None else self.largest / scales
        self.memo.clear()


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While it is open, see(name, input, output) is called whenever one of these modules has run."""

    def hook(name: str) -> Any:
        return lambda module, given, output: see(name, given[0], output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stop(Exception):
    """Ends a forward pass whose rest is of no use."""


class Collector:
    """Hooks on the wanted layers of one block. Layers that get one and the same tensor share their statistics."""

    def __init__(
        self,
        layers: dict[str, nn.Linear],
        needs: frozenset[str],
        seconds: dict[str, float],
        processes: Processes = ALONE,
    ):
        self.layers = layers
        self.processes = processes
        self.needs = needs
        self.seconds = seconds
        self.owners: dict[str, str] = {}
        self.found: dict[str, InputStatistics] = {}
        self.seen: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self.calls: list[str] = []
        self.stop_early = False
        self.originals: dict[str, list[Tensor]] | None = None
        self.hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]

    def watch_original(self) -> None:
        """Before a pass of the unchanged inputs, which `start` and the pass of the same chunk must follow."""
        self.calls = []
        self.originals = {}

    def start(self) -> None:
        self.calls = []
        self.seen = {}
        self.before, self.originals = self.originals, None

    def finish(self) -> None:
        """After a whole pass: if every layer was called once, later passes may stop at the last of them."""
        self.stop_early = sorted(self.calls) == sorted(self.layers)
        self.seen = {}

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def statistics(self) -> dict[str, InputStatistics]:
        """Of what all processes saw."""
        begin = time.monotonic()
        if self.processes.count > 1:
            self._add_up()
        for value in self.found.values():
            if value.hessian is not None:
                mirror(value.hessian)
                value.square_sum = value.hessian.diagonal().clone()
        self.seconds["statistics"] += time.monotonic() - begin
        result = {name: self.found[owner] for name, owner in self.owners.items()}
        for name, layer in self.layers.items():
            if name not in result:
                result[name] = self._empty(layer.weight)
                result[name].notes.append("no calibration token reached this layer")
        return result

    def _add_up(self) -> None:
        owners: dict[str, str] = {}
        for theirs in self.processes.gather(self.owners):
            for name, owner in theirs.items():  # none that saw no token of a layer has it
                if owners.setdefault(name, owner) != owner:
                    what = f"shares its input with {owner} in one process and with {owners[name]} in another"
                    raise ModelError(Problem(name, what, "add the layer to skip"))
        self.owners = owners
        counts = self.processes.gather({name: value.tokens for name, value in self.found.items()})
        for name in dict.fromkeys(owners.values()):
            if name not in self.found:
                self.found[name] = self._empty(self.layers[name].weight)
            value = self.found[name]
            value.tokens = sum(count.get(name, 0) for count in counts)
            for tensor in (value.hessian, value.square_sum, value.sum, value.drift):
                if tensor is not None and tensor.numel():
                    self.processes.add_up(tensor)
            if value.largest is not None:
                parts = self.processes.gather(value.largest.cpu())
                value.largest.copy_(torch.stack(parts).amax(0))

    def _empty(self, like: Tensor) -> InputStatistics:
        """like: (any, in)."""
        columns = like.shape[1]
        vectors = (torch.zeros(columns, device=like.device) for _ in range(2))
        matrices = (
            torch.zeros(columns, columns, device=like.device) if need in self.needs else None
            for need in ("hessian", "drift")
        )
        hessian, drift = matrices
        square_sum, total = vectors
        largest = torch.zeros(columns, device=like.device) if "largest" in self.needs else None
        return InputStatistics(hessian, square_sum=square_sum, sum=total, drift=drift, largest=largest)

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs = given[0]
            self.calls.append(name)
            if self.originals is not None:
                if self.owners.get(name, name) == name:
                    self.originals.setdefault(name, []).append(_rows(inputs))
            else:
                self._see(name, inputs)
            if self.stop_early and len(self.calls) == len(self.layers):
                raise Stop

        return hook

    def _see(self, name: str, inputs: Tensor) -> None:
        # The tensor is held, so that its id stays its own; the version tells changes in place.
        owner = self.seen.setdefault((id(inputs), inputs._version), (inputs, name))[1]
        if self.owners.setdefault(name, owner) != owner:
            what = f"shares its input with {owner} in one pass and with {self.owners[name]} in another"
            raise ModelError(Problem(name, what, "add the layer to skip"))
        if owner == name:
            self._add(name, inputs)

    def _add(self, name: str, inputs: Tensor) -> None:
        begin = time.monotonic()
        rows = _rows(inputs)
        if name not in self.found:
            self.found[name] = self._empty(rows)
        found = self.found[name]
        found.sum += rows.sum(0)
        if found.largest is not None:
            torch.maximum(found.largest, rows.abs().amax(0), out=found.largest)
        if found.hessian is not None:
            add_gram(found.hessian, rows)
        else:
            found.square_sum += rows.square().sum(0)
        if found.drift is not None:
            assert self.before is not None
            original = self.before[name].pop(0)
            if original.shape != rows.shape:
                what = f"gets {len(rows)} tokens where it got {len(original)} in the unchanged model"
                raise ModelError(Problem(name, what, "add the layer to skip, or use gptq"))
            found.drift.addmm_((original - rows).T, rows)
        found.tokens += len(rows)
        self.seconds["statistics"] += time.monotonic() - begin


def _rows(inputs: Tensor) -> Tensor:
    """(tokens, in), float32."""
    return inputs.detach().reshape(-1, inputs.shape[-1]).float()

"""The walk over the decoder blocks: the one place with hooks and calibration activations.

    walk = BlockWalk(model, calibration, layers)
    for statistics in walk:                 # one turn a block, in order
        ...                                 # replace the weights of the block's layers
    # the next block gets the outputs of this one as it is now

Only the activations between two blocks are kept, for all calibration tokens, and the statistics of one block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress_peft.errors import DataError, ModelError, Problem
from compress_peft.models.layers import decoder_layers
from compress_peft.tensors.sweep import add_gram, mirror

CHUNK_TOKENS = 2048
"""Tokens in one pass through a block: enough to keep the matrix products busy."""


@dataclass
class InputStatistics:
    """What calibration showed of the inputs of a layer; one object for all layers that share their input."""

    hessian: Tensor
    """X^T X over all tokens, float32 (in, in)."""
    tokens: int = 0
    """Rows of X: the tokens that reached the layer."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of them, in words."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """For what a method derives from the Hessian and wants again at the next layer that shares it."""


class _Stop(Exception):
    """Ends a forward pass whose rest is of no use."""


class BlockWalk:
    """One pass over the blocks of a model in memory.

    layers: the linear layers, by full name, whose inputs are wanted. calibration: (samples, length) int64 token ids,
    all of them real tokens. `seconds` has the time spent by kind ("forward", "statistics"), of the walk alone.

    Raises:
        ModelError: blocks whose arguments depend on the text, or calibration that gives NaN.
        DataError: token ids that do not fit the model.
    """

    def __init__(self, model: nn.Module, calibration: Tensor, layers: dict[str, nn.Linear], progress: bool = True):
        self.model = model
        self.blocks = decoder_layers(model)
        self.layers = layers
        self.progress = progress
        self.seconds = {"forward": 0.0, "statistics": 0.0}
        self.chunks = _chunks(model, calibration)

    def __iter__(self) -> Iterator[dict[str, InputStatistics]]:
        was_training = self.model.training
        self.model.eval()
        try:
            hidden, arguments = self._first_inputs()
            bar = tqdm(self.blocks, desc="block walk", unit="block", disable=not self.progress)
            for index, (name, block) in enumerate(bar):
                wanted = {key: layer for key, layer in self.layers.items() if key.startswith(name + ".")}
                yield self._collect(block, wanted, hidden, arguments[index]) if wanted else {}
                if index + 1 < len(self.blocks):
                    self._advance(block, hidden, arguments[index])
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def _first_inputs(self) -> tuple[list[Tensor], list[tuple[tuple, dict]]]:
        """The hidden states before the first block, by chunk, and what else each block is called with."""
        arguments: list[tuple[tuple, dict]] = []
        hidden = []
        device = next(self.model.parameters()).device
        begin = time.monotonic()
        with _passing(self.blocks, arguments):
            hidden.append(self._until_stopped(self.chunks[0].to(device)))
        for chunk in self.chunks[1:]:
            mine: list[tuple[tuple, dict]] = []
            with _passing(self.blocks[:1], mine):
                hidden.append(self._until_stopped(chunk.to(device)))
            if not _same(mine[0], arguments[0]):
                what = "its blocks are called with arguments that depend on the text, which the block walk cannot give"
                raise ModelError(Problem(type(self.model).__name__, what, "use a method without calibration"))
        self.seconds["forward"] += time.monotonic() - begin
        return hidden, arguments

    def _until_stopped(self, tokens: Tensor) -> Tensor:
        try:
            self.model(input_ids=tokens, use_cache=False)
        except _Stop as stop:
            hidden: Tensor = stop.args[0]
            return hidden
        raise AssertionError("the model ran without calling its blocks")

    @torch.no_grad()
    def _collect(
        self, block: nn.Module, wanted: dict[str, nn.Linear], hidden: list[Tensor], arguments: tuple[tuple, dict]
    ) -> dict[str, InputStatistics]:
        """The statistics of the wanted layers, in the order in which the block calls them; then those never called."""
        begin, before = time.monotonic(), self.seconds["statistics"]
        collector = _Collector(wanted, self.seconds)
        try:
            for states in hidden:
                collector.start()
                try:
                    block(states, *arguments[0], **arguments[1])
                except _Stop:
                    continue
                collector.finish()
        finally:
            collector.remove()
        self.seconds["forward"] += time.monotonic() - begin - (self.seconds["statistics"] - before)
        found = collector.statistics()
        broken = [name for name, value in found.items() if not bool(torch.isfinite(value.hessian).all())]
        if broken:
            fix = "check the model's weights; in float16, load it as float32"
            raise ModelError([Problem(name, "NaN or infinite inputs in the calibration pass", fix) for name in broken])
        return found

    @torch.no_grad()
    def _advance(self, block: nn.Module, hidden: list[Tensor], arguments: tuple[tuple, dict]) -> None:
        """Replace the inputs of this block by its outputs."""
        begin = time.monotonic()
        for index, states in enumerate(hidden):
            output = block(states, *arguments[0], **arguments[1])
            hidden[index] = output if isinstance(output, Tensor) else output[0]
        self.seconds["forward"] += time.monotonic() - begin


class _Collector:
    """Hooks on the wanted layers of one block. Layers that get one and the same tensor share one Hessian."""

    def __init__(self, layers: dict[str, nn.Linear], seconds: dict[str, float]):
        self.layers = layers
        self.seconds = seconds
        self.owners: dict[str, str] = {}
        self.found: dict[str, InputStatistics] = {}
        self.seen: dict[tuple[int, int], tuple[Tensor, str]] = {}
        self.calls: list[str] = []
        self.stop_early = False
        self.hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]

    def start(self) -> None:
        self.calls = []
        self.seen = {}

    def finish(self) -> None:
        """After a whole pass: if every layer was called once, later passes may stop at the last of them."""
        self.stop_early = sorted(self.calls) == sorted(self.layers)
        self.seen = {}

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def statistics(self) -> dict[str, InputStatistics]:
        begin = time.monotonic()
        for value in self.found.values():
            mirror(value.hessian)
        self.seconds["statistics"] += time.monotonic() - begin
        result = {name: self.found[owner] for name, owner in self.owners.items()}
        for name, layer in self.layers.items():
            if name not in result:
                hessian = layer.weight.new_zeros(layer.in_features, layer.in_features, dtype=torch.float32)
                result[name] = InputStatistics(hessian, notes=["no calibration token reached this layer"])
        return result

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs = given[0]
            self.calls.append(name)
            # The tensor is held, so that its id stays its own; the version tells changes in place.
            owner = self.seen.setdefault((id(inputs), inputs._version), (inputs, name))[1]
            if self.owners.setdefault(name, owner) != owner:
                what = f"shares its input with {owner} in one pass and with {self.owners[name]} in another"
                raise ModelError(Problem(name, what, "add the layer to skip"))
            if owner == name:
                self._add(name, inputs)
            if self.stop_early and len(self.calls) == len(self.layers):
                raise _Stop

        return hook

    def _add(self, name: str, inputs: Tensor) -> None:
        begin = time.monotonic()
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if name not in self.found:
            self.found[name] = InputStatistics(rows.new_zeros(rows.shape[1], rows.shape[1]))
        add_gram(self.found[name].hessian, rows)
        self.found[name].tokens += len(rows)
        self.seconds["statistics"] += time.monotonic() - begin


@contextmanager
def _passing(blocks: list[tuple[str, nn.Module]], arguments: list[tuple[tuple, dict]]) -> Iterator[None]:
    """Let the blocks record what they are called with besides the hidden states, in order, and hand these through.

    The last one ends the pass with _Stop(hidden states). The first is run, unless it is the last, to see in what form
    blocks return their result.
    """
    form: list[Any] = []

    def stand_in(index: int, run: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            arguments.append((args[1:], kwargs))
            if index == len(blocks) - 1:
                raise _Stop(hidden)
            if not form:
                form.append(run(*args, **kwargs) if args else run(hidden, **kwargs))
            return hidden if isinstance(form[0], Tensor) else (hidden, *form[0][1:])

        return forward

    modules = [block for _, block in blocks]
    own = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = stand_in(index, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _chunks(model: nn.Module, calibration: Tensor) -> tuple[Tensor, ...]:
    """The rows in equal chunks, so that the blocks' other arguments fit all of them."""
    config: Any = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    vocabulary = getattr(config, "vocab_size", None)
    what = ""
    if calibration.dim() != 2 or calibration.dtype != torch.int64 or not calibration.numel():
        what = f"expected token ids, int64 (samples, length); got {calibration.dtype} {tuple(calibration.shape)}"
    elif limit is not None and calibration.shape[1] > limit:
        what = f"length {calibration.shape[1]} exceeds the model's {limit} positions"
    elif calibration.min() < 0 or (vocabulary is not None and calibration.max() >= vocabulary):
        what = f"token ids from {calibration.min()} to {calibration.max()} for a vocabulary of {vocabulary}"
    if what:
        raise DataError(Problem("calibration", what, "correct the calibration"))
    samples, length = calibration.shape
    rows = max(rows for rows in range(1, samples + 1) if samples % rows == 0 and rows <= max(1, CHUNK_TOKENS // length))
    return calibration.split(rows)


def _same(first: Any, second: Any) -> bool:
    """Equality of nested arguments with tensors in them."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(first == second)

"""The walk over the decoder blocks: the one place with hooks and calibration activations.

    walk = BlockWalk(model, calibration, layers, needs=("norms",))
    for turn in walk:                       # one BlockTurn a block, in order
        consumer.process(turn)              # replace the weights of the block's layers
    # the next block gets the outputs of this one as it is now

Only the activations between two blocks are kept, for all calibration tokens, and the statistics of one block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compress_peft.errors import ConfigError, DataError, ModelError, Problem
from compress_peft.models.heap import trim_heap
from compress_peft.models.layers import decoder_layers, is_encoder_decoder
from compress_peft.models.processes import ALONE, Processes
from compress_peft.models.statistics import NEEDS, Collector, Stop
from compress_peft.models.statistics import InputStatistics as InputStatistics
from compress_peft.models.two_stacks import Arguments, DecoderTargets, TwoStacks, passing

CHUNK_TOKENS = 2048
"""Tokens in one pass through a block: enough to keep the matrix products busy."""


def chunk_tokens(needs: Container[str]) -> int:
    """Of a pass in a walk with these needs. Who wants targets trains the block, and what a pass keeps for the way back
    is its peak memory: half as many do there."""
    return CHUNK_TOKENS // 2 if "targets" in needs else CHUNK_TOKENS


@dataclass
class BlockTurn:
    """One block of the walk, while its consumer may change it."""

    name: str
    """The full name of the block."""
    block: nn.Module
    layers: dict[str, nn.Linear]
    """The wanted layers of the block, by full name."""
    statistics: dict[str, InputStatistics]
    """By full name of the layer, in the order in which the block calls them. Empty if there is no calibration, or only
    "inputs" or "targets" were asked for. A consumer may drop entries to free them."""
    inputs: Sequence[Tensor]
    """Hidden states into the block, by chunk (rows, length, hidden). Not to be changed. In the decoder of an
    encoder-decoder, what the encoder puts out stands behind them, and `run` hands it through."""
    targets: Sequence[Tensor]
    """By chunk, what the block puts out in the unchanged model; empty unless "targets" were asked for."""
    run: Callable[[Tensor], Tensor]
    """The block's output for one such chunk, with its masks and position embeddings, as the block is at the time of the
    call. Gradients flow if they are on."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What the consumer wants to find again at the next block; one for the whole walk."""


class Consumer(Protocol):
    """What is done with each block; it does not know where the blocks come from."""

    def process(self, turn: BlockTurn) -> None:
        """Change what is to be changed in `turn.block`; the walk goes on with its new outputs."""


class BlockStore(Protocol):
    """Where blocks come from if the model is not in memory."""

    def load(self, name: str, original: bool) -> None:
        """Give the block its weights: those of the unchanged model, or else the block as the consumer left it.
        The name "" stands for what the model computes before its first block."""

    def free(self, name: str) -> None:
        """Take these weights out of memory."""

    def finished(self, name: str) -> bool:
        """Whether an earlier walk changed this block already."""

    def activations(self) -> MutableSequence[Tensor]:
        """An empty list for activations, which holds them wherever they fit."""


class InMemory:
    """The whole model is there."""

    def load(self, name: str, original: bool) -> None:
        pass

    def free(self, name: str) -> None:
        pass

    def finished(self, name: str) -> bool:
        return False

    def activations(self) -> MutableSequence[Tensor]:
        return []


WHOLE = frozenset({"inputs", "targets"})
"""Needs that are no sums, so that processes cannot add them up."""


class BlockWalk:
    """One pass over the blocks of a model.

    layers: the linear layers, by full name, whose inputs are wanted. calibration: (samples, length) int64 token ids,
    all of them real tokens; None for consumers that only look at weights. needs: of NEEDS; X^T X is worked out only for
    "hessian". store: where blocks come from. processes: those that make the same walk, each with its part of the
    calibration; statistics are those of all. `seconds` has the time spent by kind ("forward", "statistics"), of the
    walk alone.

    Raises:
        ConfigError: several processes and needs that take all samples to one place, or too few samples.
        ModelError: blocks whose arguments depend on the text, or calibration that gives NaN.
        DataError: token ids that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Tensor | None,
        layers: dict[str, nn.Linear],
        progress: bool = True,
        needs: Sequence[str] = ("hessian",),
        store: BlockStore | None = None,
        processes: Processes = ALONE,
    ):
        assert set(needs) <= set(NEEDS), f"{needs}: the walk knows {NEEDS}"
        self.model = model
        self.blocks = decoder_layers(model)
        self.layers = layers
        self.progress = progress and processes.leads
        self.needs = frozenset(needs)
        self.processes = processes
        self.store = store or InMemory()
        self.seconds = {"forward": 0.0, "statistics": 0.0}
        self.two: TwoStacks | None = None
        self.chunks = () if calibration is None else _chunks(model, calibration, chunk_tokens(needs), processes)
        if processes.count > 1 and self.needs & WHOLE:
            what = f"the method works on all calibration samples at once, and {processes.count} processes have parts"
            raise ConfigError(Problem("calibration", what, "start it in one process, or use another method"))

    def __iter__(self) -> Iterator[BlockTurn]:
        was_training = self.model.training
        self.model.eval()
        try:
            unfinished = [index for index, (name, _) in enumerate(self.blocks) if not self.store.finished(name)]
            if not unfinished:
                return
            states, arguments = self._first_inputs()
            originals = self.store.activations()
            if self.needs & {"drift", "targets"}:
                originals.extend(states)
            memory: dict[str, Any] = {}
            bar = tqdm(self.blocks, desc="block walk", unit="block", disable=not self.progress)
            for index, (name, block) in enumerate(bar):
                decoding = self.two is not None and index >= self.two.second
                run = partial(self.two.run if self.two and decoding else _run, block, arguments[index])
                if self.two and index == self.two.second:
                    for held in (states, originals):
                        if len(held):
                            self.two.cross(held)
                advance = index < unfinished[-1]
                if index not in unfinished:
                    if advance:
                        self._pass_by(name, run, states, originals)
                    continue
                wanted = {key: layer for key, layer in self.layers.items() if key.startswith(name + ".")}
                self.store.load(name, original=True)
                found = self._collect(wanted, run, states, originals)
                trim_heap()  # of what passed through the block
                if advance or "targets" in self.needs:
                    self._advance(run, originals)
                targets: Sequence[Tensor] = originals if "targets" in self.needs else ()
                if targets and self.two and decoding:
                    targets = DecoderTargets(originals, states, self.two.length)
                yield BlockTurn(name, block, wanted, found, states, targets, run, memory)
                if advance:
                    self._advance(run, states)
                self.store.free(name)
                trim_heap()
        finally:
            self.model.train(was_training)

    def run(self, consumer: Consumer) -> None:
        """The whole walk, with this consumer at every block."""
        for turn in self:
            consumer.process(turn)

    @torch.no_grad()
    def _first_inputs(self) -> tuple[MutableSequence[Tensor], list[Arguments]]:
        """The hidden states before the first block, by chunk, and what else each block is called with."""
        hidden = self.store.activations()
        if not self.chunks:
            return hidden, [((), {})] * len(self.blocks)
        self.two = TwoStacks(self.model, self.blocks) if is_encoder_decoder(self.model) else None
        begin = time.monotonic()
        first = self.blocks[0][0]
        self.store.load("", original=True)
        self.store.load(first, original=True)
        device = next(self.blocks[0][1].parameters()).device
        states, arguments = self._enter(self.chunks[0].to(device), self.blocks)
        hidden.append(states)
        self.store.free(first)
        for chunk in self.chunks[1:]:
            states, mine = self._enter(chunk.to(device), self.blocks[:1])
            hidden.append(states)
            if not _same(mine[0], arguments[0]):
                what = "its blocks are called with arguments that depend on the text, which the block walk cannot give"
                raise ModelError(Problem(type(self.model).__name__, what, "use a method without calibration"))
        self.store.free("")
        self.seconds["forward"] += time.monotonic() - begin
        return hidden, arguments

    def _enter(self, tokens: Tensor, blocks: list[tuple[str, nn.Module]]) -> tuple[Tensor, list[Arguments]]:
        """The hidden states of a chunk before the first block, and what else these blocks are called with."""
        if self.two is not None:
            return self.two.enter(tokens)
        with passing(blocks) as passed:
            try:
                self.model(input_ids=tokens, use_cache=False)
            except Stop:
                return passed.entered[0], passed.arguments
        raise AssertionError("the model ran without calling its blocks")

    @torch.no_grad()
    def _collect(
        self,
        wanted: dict[str, nn.Linear],
        run: Callable[[Tensor], Tensor],
        states: Sequence[Tensor],
        originals: Sequence[Tensor],
    ) -> dict[str, InputStatistics]:
        """The statistics of the wanted layers, in the order in which the block calls them; then those never called."""
        if not wanted or not self.chunks or (self.needs and self.needs <= {"inputs", "targets"}):
            return {}
        begin, before = time.monotonic(), self.seconds["statistics"]
        collector = Collector(wanted, self.needs, self.seconds, self.processes)
        try:
            for index in range(len(states)):
                if "drift" in self.needs:
                    collector.watch_original()
                    _ended(run, originals[index])
                collector.start()
                if not _ended(run, states[index]):
                    collector.finish()
        finally:
            collector.remove()
        self.seconds["forward"] += time.monotonic() - begin - (self.seconds["statistics"] - before)
        found = collector.statistics()
        broken = [name for name, value in found.items() if not bool(torch.isfinite(value.square_sum).all())]
        if broken:
            fix = "check the model's weights; in float16, load it as float32"
            raise ModelError([Problem(name, "NaN or infinite inputs in the calibration pass", fix) for name in broken])
        return found

    @torch.no_grad()
    def _advance(self, run: Callable[[Tensor], Tensor], states: MutableSequence[Tensor]) -> None:
        """Replace the inputs of a block by its outputs."""
        begin = time.monotonic()
        for index in range(len(states)):
            states[index] = run(states[index])
        self.seconds["forward"] += time.monotonic() - begin

    def _pass_by(
        self,
        name: str,
        run: Callable[[Tensor], Tensor],
        states: MutableSequence[Tensor],
        originals: MutableSequence[Tensor],
    ) -> None:
        """Advance over a block that an earlier walk finished."""
        for original, held in ((True, originals), (False, states)):
            if len(held):
                self.store.load(name, original)
                self._advance(run, held)
                self.store.free(name)
                trim_heap()


def _run(block: nn.Module, arguments: Arguments, states: Tensor) -> Tensor:
    output = block(states, *arguments[0], **arguments[1])
    return output if isinstance(output, Tensor) else output[0]


def _ended(run: Callable[[Tensor], Tensor], states: Tensor) -> bool:
    """Run the block; whether a hook ended the pass."""
    try:
        run(states)
    except Stop:
        return True
    return False


def _chunks(model: nn.Module, calibration: Tensor, tokens: int, processes: Processes) -> tuple[Tensor, ...]:
    """The rows of this process in chunks of at most this many tokens, or of one row; equal, so that the blocks' other
    arguments fit all of them."""
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
    calibration = processes.part(calibration)
    samples, length = calibration.shape
    rows = max(rows for rows in range(1, samples + 1) if samples % rows == 0 and rows <= max(1, tokens // length))
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

"""The block walk over an encoder-decoder: the encoder's blocks, then the decoder's, as one chain.

    encoder     states = hidden states of the first half of each calibration sample
    decoder     states = those of the second half, and behind them, along the tokens, what the encoder puts out

So one tensor a chunk is all that passes from block to block, as with one stack, and blocks of the decoder see what the
encoder puts out as it is by then. The first half is the prompt and the second its response, as in the training that
makes a language model of T5 (Lester et al. 2021, arXiv 2104.08691, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress_peft.errors import DataError, ModelError, Problem
from compress_peft.models.encoder_decoder import start_token
from compress_peft.models.statistics import Stop

Arguments = tuple[tuple, dict]
Blocks = list[tuple[str, nn.Module]]


class Encoded:
    """Among a block's arguments: stands for what the encoder put out."""


class Passed(NamedTuple):
    """What the blocks of a pass were called with."""

    arguments: list[Arguments]
    """Besides the hidden states, by block."""
    entered: list[Tensor]
    """The hidden states before the first block of each stack."""


@contextmanager
def passing(blocks: Blocks, starts: Sequence[int] = (0,), instead: Tensor | None = None) -> Iterator[Passed]:
    """Let the blocks record what they are called with, in order, and hand their hidden states through.

    starts: the first block of each stack, which is run, unless it is the last of all, to see in what form blocks
    return their result. instead: hidden states that all hand on in place of their own. Without them the last block
    ends the pass with `Stop`.
    """
    found, forms = Passed([], []), {}

    def stand_in(index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        stack = sum(start <= index for start in starts)

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            found.arguments.append((args[1:], kwargs))
            if index in starts:
                found.entered.append(hidden)
            if index == len(blocks) - 1 and instead is None:
                raise Stop
            if stack not in forms:
                forms[stack] = run(*args, **kwargs) if args else run(hidden, **kwargs)
            handed = hidden if instead is None else instead
            return handed if isinstance(forms[stack], Tensor) else (handed, *forms[stack][1:])

        return forward

    modules = [block for _, block in blocks]
    own = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = stand_in(index, module.forward)
    try:
        yield found
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


class TwoStacks:
    """The encoder and the decoder of a model, for the walk."""

    def __init__(self, model: nn.Module, blocks: Blocks):
        """blocks: of the encoder, then of the decoder."""
        halves: Any = model
        self.model = halves
        self.encoder: nn.Module = halves.get_encoder()
        inside = {id(module) for module in self.encoder.modules()}
        self.blocks = blocks
        self.second = next(index for index, (_, block) in enumerate(blocks) if id(block) not in inside)
        """Which block is the decoder's first."""
        self.begins: MutableSequence[Tensor] = []
        """Hidden states before that block, by chunk."""
        self.tokens: list[Tensor] = []
        """What the encoder reads, by chunk."""
        self.length = 0
        """Of the decoder's tokens."""

    def inputs(self, chunk: Tensor) -> dict[str, Tensor]:
        """The model's arguments for token ids (rows, length).

        Raises:
            DataError: there are no two halves.
        """
        half = chunk.shape[1] // 2
        if not half:
            raise DataError(Problem("calibration.length", "1 token is too short for two stacks", "give at least 2"))
        start = torch.full_like(chunk[:, :1], start_token(self.model))
        return {"input_ids": chunk[:, :half], "decoder_input_ids": torch.cat([start, chunk[:, half:-1]], dim=1)}

    @torch.no_grad()
    def enter(self, chunk: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The hidden states of a chunk before the encoder's first block, and what else each block is called with.

        Raises:
            ModelError: the decoder's blocks are not called with what the encoder puts out.
        """
        given = self.inputs(chunk)
        out: list[Any] = []
        handle = self.encoder.register_forward_hook(lambda module, args, output: out.append(output[0]))
        try:
            with passing(self.blocks, (0, self.second)) as passed, suppress(Stop):
                self.model(**given, use_cache=False)
        finally:
            handle.remove()
        self.tokens.append(given["input_ids"])
        self.begins.append(passed.entered[1])
        self.length = passed.entered[1].shape[1]
        decoders = [(_mark(args, out[0]), _mark(kwargs, out[0])) for args, kwargs in passed.arguments[self.second :]]
        if not all(any(value is Encoded for value in (*args, *kwargs.values())) for args, kwargs in decoders):
            what = "its decoder's blocks are not called with what the encoder puts out"
            raise ModelError(Problem(type(self.model).__name__, what, "use a method without calibration"))
        return passed.entered[0], passed.arguments[: self.second] + decoders

    @torch.no_grad()
    def cross(self, states: MutableSequence[Tensor]) -> None:
        """From the outputs of the encoder's last block, by chunk, to the states before the decoder's first one."""
        for index, tokens in enumerate(self.tokens):
            with passing(self.blocks[: self.second], instead=states[index]):
                encoded = self.encoder(input_ids=tokens)[0]
            states[index] = torch.cat([self.begins[index], encoded], dim=1)

    def run(self, block: nn.Module, arguments: Arguments, states: Tensor) -> Tensor:
        """A block of the decoder; what the encoder put out is handed through."""
        own, encoded = states[:, : self.length].contiguous(), states[:, self.length :].contiguous()
        args, kwargs = _fill(arguments[0], encoded), _fill(arguments[1], encoded)
        output = block(own, *args, **kwargs)
        return torch.cat([output if isinstance(output, Tensor) else output[0], encoded], dim=1)


class DecoderTargets(Sequence[Tensor]):
    """What a block of the decoder puts out in the unchanged model, by chunk, and behind it what the encoder puts out
    now, so that it differs from what the block puts out by its own error alone."""

    def __init__(self, unchanged: Sequence[Tensor], states: Sequence[Tensor], length: int):
        self.unchanged, self.states, self.length = unchanged, states, length

    def __len__(self) -> int:
        return len(self.unchanged)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return torch.cat([self.unchanged[index][:, : self.length], self.states[index][:, self.length :]], dim=1)


def _mark(arguments: Any, encoded: Tensor) -> Any:
    return _replace(arguments, lambda value: Encoded if value is encoded else value)


def _fill(arguments: Any, encoded: Tensor) -> Any:
    return _replace(arguments, lambda value: encoded if value is Encoded else value)


def _replace(arguments: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(arguments, dict):
        return {key: change(value) for key, value in arguments.items()}
    return tuple(map(change, arguments))

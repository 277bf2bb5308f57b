"""Speed of a loaded model: one setting in full, and further batch sizes, prompt lengths and beams.

Greedy decoding is timed through forward calls and a cache, beams through transformers' `generate`. What a timing
depends on is measured beside it, in the same process: how much other processes used of the processors, how fast the
memory is read at this moment (on rented machines that may change by half within a minute), and the energy where the
machine tells.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import BaseModelOutput

from compress_peft.models.encoder_decoder import start_token
from compress_peft.models.growing_cache import grow_in_place
from compress_peft.models.layers import is_encoder_decoder
from compress_peft.models.prompts import prompt_kwargs
from compress_peft.weights.compressed import CompressedWeight
from eval.costs import Latency, LatencyPoint, Timing
from eval.energy import EnergyMeter
from eval.forward import transformers_model
from eval.machine import read_bandwidth

if TYPE_CHECKING:
    from eval.profile import ProfileSettings


SHORTEST = 0.5
"""Seconds; processors' time is counted in steps of 0.01."""


class Run(NamedTuple):
    """One request: seconds of prompt and first token, seconds of all further tokens, bytes of keys and values."""

    prefill: float
    decode: float
    cache_bytes: int


def time_model(model: Any, settings: ProfileSettings, peak: Callable[[], int]) -> tuple[Latency, int, int]:
    """The speed, the bytes of keys and values, and `peak()` after the first setting, before the further ones.

    The caller has checked that prompt and new tokens fit the model's positions.
    """
    device = next(model.parameters()).device
    prompt = _prompt(model, settings.batch, settings.prompt_tokens)
    decode(model, prompt, min(3, settings.new_tokens))
    meter, others = EnergyMeter(device), OtherLoad()
    runs = [decode(model, prompt, settings.new_tokens) for _ in range(settings.repeats)]
    load, energy = others.share(), meter.joules()
    highest = peak()
    bandwidth = read_bandwidth(device=device)
    tokens = settings.batch * settings.new_tokens * settings.repeats
    latency = Latency(
        **_timings(runs, settings.batch, settings.new_tokens),
        batch=settings.batch,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        bytes_per_step=_bytes_per_step(model, runs[-1], settings.prompt_tokens, settings.new_tokens),
        read_bandwidth=bandwidth,
        other_load=load,
        joules_per_token=None if energy is None else energy / tokens,
        energy_source=meter.source,
        grid=tuple(_point(model, settings, *each) for each in _further(settings)),
    )
    return latency, runs[-1].cache_bytes, highest


def _further(settings: ProfileSettings) -> list[tuple[int, int, int]]:
    """(batch, prompt length, beams) of the further timings."""
    if not (settings.batches or settings.prompts or settings.beams):
        return []
    batches, prompts = settings.batches or (settings.batch,), settings.prompts or (settings.prompt_tokens,)
    return list(itertools.product(batches, prompts, settings.beams or (1,)))


def _point(model: Any, settings: ProfileSettings, batch: int, length: int, beams: int) -> LatencyPoint:
    prompt = _prompt(model, batch, length)
    run = decode if beams == 1 else _beam_search(beams)
    run(model, prompt, min(3, settings.new_tokens))
    runs = [run(model, prompt, settings.new_tokens) for _ in range(settings.repeats)]
    timings = _timings(runs, batch, settings.new_tokens)
    return LatencyPoint(batch=batch, prompt_tokens=length, beams=beams, **timings)


def _timings(runs: list[Run], batch: int, new_tokens: int) -> dict[str, Timing]:
    """The first token comes out of the prefill, so that decoding is timed over one less."""
    tokens = batch * (new_tokens - 1)
    return {
        "prefill_seconds": Timing.from_values([run.prefill for run in runs]),
        "decode_tokens_per_second": Timing.from_values([tokens / run.decode for run in runs]),
    }


def _prompt(model: Any, batch: int, length: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(next(model.parameters()).device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def decode(model: Any, prompt: Tensor, new_tokens: int) -> Run:
    """Prefill and `new_tokens` greedy tokens, whatever they are (an end of text does not stop it).

    The prefill of an encoder-decoder is the encoder's work on the prompt and the decoder's start token.
    """
    prompt_end = torch.full((prompt.shape[0],), prompt.shape[1] - 1, device=prompt.device)
    with torch.inference_mode():
        caches = [DynamicCache(config=model.config)]
        if prompt.is_cpu:  # as `generate` of a model that was loaded
            grow_in_place(caches[0])
        inputs: dict[str, Any] = {"use_cache": True}
        start = _now(prompt.device)
        if is_encoder_decoder(model):
            caches.append(DynamicCache(config=model.config))
            read = transformers_model(model).get_encoder()(input_ids=prompt)[0]
            inputs |= {"past_key_values": EncoderDecoderCache(*caches), "encoder_outputs": BaseModelOutput(read)}
            name, first = "decoder_input_ids", torch.full_like(prompt[:, :1], start_token(model))
        else:
            inputs |= {"past_key_values": caches[0], "logits_to_keep": 1}
            name, first = "input_ids", prompt
        logits = model(**{name: first}, **inputs, **prompt_kwargs(model, prompt_end)).logits
        token = logits[:, -1:].argmax(dim=-1)
        middle = _now(prompt.device)
        for _ in range(new_tokens - 1):
            token = model(**{name: token}, **inputs).logits[:, -1:].argmax(dim=-1)
        end = _now(prompt.device)
    layers = [layer for cache in caches for layer in cache.layers]
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    cache_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Run(prefill=middle - start, decode=end - middle, cache_bytes=cache_bytes)


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when `generate` has chosen its first token."""

    seconds: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.seconds is None:
            self.seconds = _now(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _beam_search(beams: int) -> Callable[[Any, Tensor, int], Run]:
    """As `decode`, but by `generate`."""

    def run(model: Any, prompt: Tensor, new_tokens: int) -> Run:
        clock = _FirstToken()
        start = _now(prompt.device)
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        end = _now(prompt.device)
        assert clock.seconds is not None
        return Run(prefill=clock.seconds - start, decode=end - clock.seconds, cache_bytes=0)

    return run


def _bytes_per_step(model: Any, run: Run, prompt_tokens: int, new_tokens: int) -> int | None:
    """What a decoding step has to read: all weights once, of an embedding table that is not the head's too a few rows,
    and keys and values at half of the way. None for an encoder-decoder, whose steps leave the encoder's weights alone.
    """
    if is_encoder_decoder(model):
        return None
    table, head = model.get_input_embeddings().weight, transformers_model(model).get_output_embeddings()
    apart = head is None or head.weight is not table
    weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    read = sum(_bytes(weight) for weight in weights.values() if not (apart and weight is table))
    filled = (prompt_tokens + new_tokens / 2) / (prompt_tokens + new_tokens - 1)
    return int(read + run.cache_bytes * filled)


def _bytes(weight: Tensor) -> int:
    return weight.storage_bytes if isinstance(weight, CompressedWeight) else weight.numel() * weight.element_size()


class OtherLoad:
    """What other processes use of the processors from now on."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """Of all processors' time since the start, from 0 to 1; None where that is too short for the kernel's clock."""
        busy, own, wall = (now - then for now, then in zip(self._read(), self._start, strict=True))
        if wall < SHORTEST:
            return None
        return min(max((busy - own) / (wall * (psutil.cpu_count() or 1)), 0.0), 1.0)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)  # counted in user already
        return sum(machine) - idle - guests, own.user + own.system, time.monotonic()

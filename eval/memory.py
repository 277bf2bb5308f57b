"""How much memory a model will take, from its structure alone: nothing is loaded or run.

    peak = process + weights + (inference) keys and values + activations of one block + logits
                             + (training)  gradients + optimizer + best weights + saved activations + logits
                             + (block walk) activations between blocks + statistics + work on a layer
                             + (merging, export) what is made of the weights, and what it is compared with

The block walk is that of `compress_peft.models.needs`. Every function is pure arithmetic on a model (on the meta device
too) and a recipe's numbers, in bytes. Only the process itself, Python with its libraries, is measured: see
`process_baseline`.
"""

from __future__ import annotations

import functools
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compress_peft.models.layers import linear_layers
from compress_peft.models.needs import LAYER_COPIES, BlockWidths, head_size, text_config
from compress_peft.models.random_model import byte_tokenizer, config_from
from compress_peft.weights.kernels import SCRATCH
from eval.costs import MemoryEstimate

ADAM_BYTES = 8
"""Of AdamW's two float32 moments, a trainable parameter."""

DISTILLED_LOGITS = 5
"""Tensors like the logits of the predicted tokens that are there at once where distributions are compared: their
log-probabilities, those without the teacher's tokens, and three in the gradient of their sum (or the logits themselves
and two in the sum, where there are no gradients)."""


@functools.cache
def process_baseline() -> int:
    """Resident bytes of this process at the first call: Python with the libraries, before any model.

    A model of two small layers runs first: half of what the libraries take, they take at their first use.
    """
    byte_tokenizer()("a")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        AutoModelForCausalLM.from_config(config_from(config | heads))(torch.zeros(1, 64, dtype=torch.long))
    return psutil.Process().memory_info().rss


def kv_cache_bytes(config: Any, rows: int, tokens: int, bytes_each: int) -> int:
    """Keys and values of `tokens` tokens of each row; a layer with a sliding window keeps no more than the window."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or tokens
    kept = sum(min(tokens, window - 1) if kind == "sliding_attention" else tokens for kind in kinds)
    return 2 * rows * kept * heads * head_size(config) * bytes_each


def scratch_bytes(model: nn.Module, compressed: bool, bytes_each: int) -> int:
    """Of the buffer in which compressed weights become dense for a product."""
    if not compressed:
        return 0
    return min(SCRATCH, max(layer.weight.numel() for _, layer in linear_layers(model))) * bytes_each


def passing_bytes(model: nn.Module, tokens: int, bytes_each: int) -> int:
    """At most alive in one block of a forward pass."""
    return tokens * BlockWidths.of(model).passing * bytes_each


def saved_bytes(model: nn.Module, tokens: int, bytes_each: int, checkpointing: bool, everything: bool) -> int:
    """Activations kept for the backward pass of `tokens` tokens.

    everything: the norms train too. With checkpointing a block keeps its input, and one block at a time all of it.
    """
    widths = BlockWidths.of(model)
    block = widths.saved(everything)
    kept = widths.hidden * widths.blocks + block if checkpointing else block * widths.blocks
    return tokens * kept * bytes_each


def estimate_inference(
    model: nn.Module,
    weights: float,
    *,
    batch: int,
    prompt: int,
    new: int,
    bytes_each: int,
    compressed: bool = False,
    stored: float | None = None,
    baseline: int = 0,
) -> MemoryEstimate:
    """Load, then prefill and greedy decoding through a cache, as `eval.profile` does it.

    weights: bytes of all parameters and buffers in memory. stored: of the file, where its dtype is another one than
    that of the model: the file is mapped while the weights are converted.
    """
    config = text_config(model)
    cache = kv_cache_bytes(config, batch, prompt + new - 1, bytes_each)
    passing = passing_bytes(model, batch * prompt, bytes_each) + scratch_bytes(model, compressed, bytes_each)
    passing += batch * config.vocab_size * 4
    return MemoryEstimate(
        baseline_bytes=baseline,
        weights_bytes=int(weights),
        load_peak_bytes=int(baseline + weights + (stored or 0)),
        kv_cache_bytes=cache,
        activation_bytes=passing,
        peak_bytes=int(baseline + weights + cache + passing),
    )


def estimate_training(
    model: nn.Module,
    weights: float,
    trainable: int,
    *,
    batch: int,
    length: int,
    response: int,
    bytes_each: int,
    compressed: bool = False,
    checkpointing: bool = False,
    added: bool = True,
    baseline: int = 0,
    distilling: bool = False,
    teacher_logits: int = 0,
) -> MemoryEstimate:
    """One optimizer step of the training loop, and a validation, of twice as many rows.

    weights: bytes of the model without an adapter. trainable: parameters that train, in float32; added: they come on
    top of the weights. length, response: tokens of a row, and those of them that are predicted. The peak is either at
    the start of the backward pass (activations) or at its end (gradients), whichever is more.

    What the tensors take. On a CPU glibc's heap keeps holes between them: 0.5 GB more for a model of 135 million
    parameters, which go with MALLOC_MMAP_THRESHOLD_=1048576 in the environment, for a third more time a step
    (`python -m benchmarks.memory_model`, with and without --heap).
    """
    vocabulary, tokens = text_config(model).vocab_size, batch * length
    saved = saved_bytes(model, tokens, bytes_each, checkpointing, everything=not added)
    logits = batch * (response + 1) * vocabulary
    scratch = scratch_bytes(model, compressed, bytes_each)
    scored = 4 * (DISTILLED_LOGITS + teacher_logits) * logits if distilling else bytes_each * logits
    gradient = 0 if distilling else scored  # of the logits, in their own dtype
    within = passing_bytes(model, tokens, bytes_each)
    backward, validating = max(scored + gradient, within) + scratch, 2 * max(scored, within) + scratch
    own, gradients, optimizer = 4 * trainable * added, 4 * trainable, ADAM_BYTES * trainable
    best = 2 * 4 * trainable  # the best weights so far, and those that are about to replace them
    held = baseline + weights + own + optimizer
    return MemoryEstimate(
        baseline_bytes=baseline,
        weights_bytes=int(weights + own),
        load_peak_bytes=int(baseline + weights),
        activation_bytes=saved + backward,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        peak_bytes=int(held + max(best // 2 + max(saved + backward, validating), gradients + best)),
    )


def estimate_scoring(
    model: nn.Module, weights: float, *, rows: int, batch: int, length: int, response: int, position: int
) -> float:
    """A teacher that writes its scores to disk. rows: at most in a file; position: bytes that a predicted token takes
    there. A file's scores are there in pieces and as a whole, and twice more as bytes when it is written."""
    logits = 4 * batch * (response + 1) * text_config(model).vocab_size
    scoring = max(DISTILLED_LOGITS * logits, passing_bytes(model, batch * length, 4))
    scores = rows * response * position
    return weights + max(scoring + scores, 4 * scores)


def estimate_merging(
    model: nn.Module,
    weights: float,
    *,
    compressed: float,
    new: float,
    length: int,
    compared: int,
    bytes_each: int,
) -> float:
    """An adapter merged into its backbone, and both compared on texts, at most.

    weights: with the adapter; they stay beside what is made of them. compressed: bytes of the compressed layers, which
    are copied before and, where they still are compressed, after (`new` counts that). new: bytes that the merge makes.
    length: of a text at most, one of which is worked out at a time; 0 for none. compared: tokens whose logits are, of
    both models and then with six more tensors for a text; of the last text all are there.
    """
    kept = 2 * (compared + length) + max(length, 6 * min(length, compared))
    comparing = 4 * kept * text_config(model).vocab_size + passing_bytes(model, length, bytes_each) if length else 0
    return weights + compressed + new + max(comparing, layer_bytes(model))


def estimate_export(model: nn.Module, weights: float, *, written: float, dense: float) -> float:
    """A model written and read back. written: bytes of the file, which is mapped when it is read.

    dense: bytes of all weights in float32 for a format that no loader of ours reads; 0 for others. What is to be
    written is then made as a whole before, and what was read becomes dense twice: as tensors and in a model.
    """
    return weights + written + (written + 2 * dense if dense else 0) + scratch_bytes(model, True, 4)


def layer_bytes(model: nn.Module) -> float:
    """Work on the largest layer alone."""
    return 4.0 * LAYER_COPIES * max(layer.weight.numel() for _, layer in linear_layers(model))

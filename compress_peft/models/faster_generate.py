"""What `generate` does with prompts. Beams, and further sequences of one prompt, share it: it is processed once.

transformers repeats every prompt before it processes it, so that three beams cost three prompts. Here the prompts go
through the model as they are, and what comes out, their keys and values and the logits of the next token, is repeated.
On a CPU the keys and values then grow in place.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compress_peft.models.growing_cache import grow_in_place
from compress_peft.models.layers import is_encoder_decoder

METHOD = "_prefill"
"""The step of transformers' generate that processes the prompts."""


def faster_generate(model: nn.Module) -> None:
    """Lets `generate` of a language model of transformers process each prompt once, and on a CPU add tokens without a
    copy of those before. The results are the same up to rounding. Does nothing where there is no such step, or somebody
    has replaced it."""
    if hasattr(model, METHOD) and METHOD not in vars(model) and not is_encoder_decoder(model):
        setattr(model, METHOD, types.MethodType(prefill, model))  # a method, since copies of the model bind it anew


def prefill(
    self: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """In place of the model's own step. input_ids: (rows * repeats, length), each row in succession; so are the tensors
    of model_kwargs."""
    plain = getattr(type(self), METHOD)
    cache: Any = model_kwargs.get("past_key_values")
    if type(cache) is DynamicCache and input_ids.is_cpu and not (cache.offloading or cache.get_seq_length()):
        grow_in_place(cache)
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if not _can_share(input_ids, repeats, generation_config, model_kwargs):
        return plain(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
    once = {key: value[::repeats] if isinstance(value, Tensor) else value for key, value in model_kwargs.items()}
    output = plain(self, input_ids[::repeats], generation_config, once, *args, **kwargs)
    output.past_key_values.batch_repeat_interleave(repeats)
    output.logits = output.logits.repeat_interleave(repeats, dim=0)
    return output


def _can_share(input_ids: Tensor, repeats: int, generation_config: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether all that enters is repeated, and all that comes out can be."""
    cache: Any = model_kwargs.get("past_key_values")
    if repeats == 1 or type(cache) is not DynamicCache or cache.get_seq_length():
        return False
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return False
    tensors = [input_ids, *(value for value in model_kwargs.values() if isinstance(value, Tensor))]
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers) and all(
        len(tensor) == len(input_ids) and torch.equal(tensor, tensor[::repeats].repeat_interleave(repeats, dim=0))
        for tensor in tensors
    )

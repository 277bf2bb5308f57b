"""GPTQ folders, as AutoGPTQ introduced them and gptqmodel, transformers and vLLM load them.

With in and out the features of a layer, G its groups and w = 32 / bits codes a word:

    qweight  int32   (in / w, out)    codes, packed along the inputs
    qzeros   int32   (G, out / w)     zeros, packed along the outputs; version 1 stores zero - 1
    scales   float16 (G, out)
    g_idx    int32   (in,)            the group of each input
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.models.foreign.base import (
    ForeignFormat,
    Refusal,
    Tensors,
    affine_refusal,
    affine_weight,
    base_settings,
    group_of,
    group_size_from,
    half_scale_refusal,
    integer_zeros,
)
from compress_peft.tensors.int32 import pack_words, unpack_words
from compress_peft.weights import AffineWeight, CompressedWeight
from compress_peft.weights.storage import Spec

MULTIPLE = 32
"""Of inputs and outputs: whole words whatever the bits, and what gptqmodel's kernels take."""


class GPTQFormat(ForeignFormat):
    """version: 1 (checkpoint_format "gptq", known everywhere) or 2 ("gptq_v2", which can hold the zero 0)."""

    quant_method: ClassVar[str] = "gptq"
    files: ClassVar[tuple[str, ...]] = ("quantize_config.json",)
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, version: int = 1):
        self.version = version

    def refusal(self, spec: Spec) -> Refusal | None:
        found = super().refusal(spec) or affine_refusal(spec, (2, 3, 4, 8))
        if found is None and any(size % MULTIPLE for size in spec["shape"]):
            what = f"it holds layers whose sizes are multiples of {MULTIPLE}, and these are {tuple(spec['shape'])}"
            found = Refusal(what, "skip these layers when quantizing, or use format: compressed-tensors")
        return found

    def data_refusal(self, weight: CompressedWeight) -> Refusal | None:
        assert isinstance(weight, AffineWeight)
        if self.version == 1 and has_zero_zero(weight):
            return Refusal("version 1 stores zero - 1, and some zeros are 0", "use version: 2, or leave it out")
        return half_scale_refusal(weight)

    def write(self, weight: CompressedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, AffineWeight)
        groups, columns = weight.scales.shape[1], weight.shape[1]
        zeros = integer_zeros(weight).t() - (1 if self.version == 1 else 0)
        return {
            "qweight": pack_words(weight.unpacked(), weight.bits).t().contiguous(),
            "qzeros": pack_words(zeros.contiguous(), weight.bits),
            "scales": weight.scales.to(torch.float16).t().contiguous(),
            "g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
        }

    def read(self, tensors: Tensors, settings: Mapping[str, Any]) -> CompressedWeight:
        columns, (groups, rows) = len(tensors["g_idx"]), tensors["scales"].shape
        bits = 32 * tensors["qweight"].shape[0] // columns
        size = columns // groups
        if not torch.equal(tensors["g_idx"].long(), torch.arange(columns) // size):
            what = "its inputs are reordered (desc_act without static groups), our groups are of consecutive inputs"
            raise ModelError(Problem("g_idx", what, "quantize the original model here: method: gptq"))
        codes = unpack_words(tensors["qweight"].t(), bits, columns)
        zeros = unpack_words(tensors["qzeros"], bits, rows).t()
        if settings.get("checkpoint_format", "gptq") != "gptq_v2":
            zeros = (zeros + 1) & (2**bits - 1)
        return affine_weight(codes, tensors["scales"].t(), zeros, bits, group_size_from(columns, groups))

    def settings(self, specs: Mapping[str, Spec], dense: Sequence[str]) -> dict[str, Any]:
        base = base_settings(specs)
        # gptqmodel's and vLLM's way of saying what differs: "+:" overrides, "-:" leaves dense; patterns of full names.
        dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in dense}
        for name, spec in specs.items():
            own = base_settings({name: spec})
            if own != base:
                dynamic[f"+:^{re.escape(name)}$"] = _named(own)
        found = {"quant_method": "gptq", "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2"}
        found |= _named(base) | {"desc_act": False, "static_groups": True, "lm_head": False, "pack_dtype": "int32"}
        return found | ({"dynamic": dynamic} if dynamic else {})


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"bits": settings["bits"], "group_size": group_of(dict(settings)), "sym": settings["symmetric"]}


def has_zero_zero(weight: AffineWeight) -> bool:
    """Whether a zero of the grid is 0, which version 1 cannot hold: 0 - 1 would run into the next zero of the word."""
    return weight.zeros is not None and bool((weight.zeros == 0).any())

"""compressed-tensors folders in the format pack-quantized (llm-compressor, vLLM, transformers).

weight_packed      int32 (out, ceil(in * bits / 32))   code - 2 ** (bits - 1), stored as the code itself
weight_scale       (out, G)
weight_zero_point  int32 (ceil(out * bits / 32), G)    the same for zeros; absent on symmetric grids
weight_shape       int64 (2,)
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
    group_size_from,
)
from compress_peft.tensors import affine
from compress_peft.tensors.int32 import pack_words, unpack_words
from compress_peft.weights import AffineWeight, CompressedWeight
from compress_peft.weights.storage import Spec

PACKED = "pack-quantized"


class CompressedTensorsFormat(ForeignFormat):
    """2, 3, 4 and 8 bits (compressed-tensors before 0.15, and vLLM: 4 and 8), scales of any dtype."""

    quant_method: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def refusal(self, spec: Spec) -> Refusal | None:
        return super().refusal(spec) or affine_refusal(spec, (2, 3, 4, 8))

    def write(self, weight: CompressedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, AffineWeight)
        stored = {
            "weight_packed": pack_words(weight.unpacked(), weight.bits),
            # transformers multiplies in the dtype of the scales.
            "weight_scale": weight.scales.float() if weight.dtype == torch.float32 else weight.scales,
            "weight_shape": torch.tensor(list(weight.shape), dtype=torch.int64),
        }
        if weight.zeros is not None:
            stored["weight_zero_point"] = pack_words(weight.zeros.t().contiguous(), weight.bits).t().contiguous()
        return stored

    def read(self, tensors: Tensors, settings: Mapping[str, Any]) -> CompressedWeight:
        if "weight_g_idx" in tensors:
            what = "its inputs are reordered (actorder: group), our groups are of consecutive inputs"
            raise ModelError(Problem("weight_g_idx", what, "quantize the original model here: method: gptq"))
        rows, columns = (int(size) for size in tensors["weight_shape"])
        words, groups = tensors["weight_packed"].shape[1], tensors["weight_scale"].shape[1]
        declared = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
        fitting = [bits for bits in affine.BITS if bits in declared and -(-columns * bits // 32) == words]
        if not fitting:
            what = f"{words} words a row of {columns} weights are not of {sorted(declared)} bits, or not 2, 3, 4 or 8"
            raise ModelError(Problem("weight_packed", what, "use a model of another format"))
        bits = fitting[0]
        codes = unpack_words(tensors["weight_packed"], bits, columns)
        zeros = tensors.get("weight_zero_point")
        unpacked = None if zeros is None else unpack_words(zeros.t(), bits, rows).t()
        return affine_weight(codes, tensors["weight_scale"], unpacked, bits, group_size_from(columns, groups))

    def settings(self, specs: Mapping[str, Spec], dense: Sequence[str]) -> dict[str, Any]:
        base = base_settings(specs)
        others: dict[tuple[Any, ...], list[str]] = {}
        for name, spec in specs.items():
            own = base_settings({name: spec})
            if own != base:
                others.setdefault(tuple(own.values()), []).append(f"re:^{re.escape(name)}$")
        groups = {"group_0": _scheme(["Linear"] if not others else _names_of(specs, base), **base)}
        for index, (values, targets) in enumerate(others.items(), start=1):
            groups[f"group_{index}"] = _scheme(targets, *values)
        # transformers 5.23 allocates zero points unpacked and refuses packed ones, unless it decodes while loading.
        decode = {} if all(spec["zero_dtype"] is None for spec in specs.values()) else {"dequantize": True}
        return decode | {
            "quant_method": self.quant_method,
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dense),
            "kv_cache_scheme": None,
        }


def _names_of(specs: Mapping[str, Spec], base: Spec) -> list[str]:
    return [f"re:^{re.escape(name)}$" for name, spec in specs.items() if base_settings({name: spec}) == base]


def _scheme(targets: list[str], bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

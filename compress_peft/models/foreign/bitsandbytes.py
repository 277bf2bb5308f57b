"""bitsandbytes' 4-bit folders with NF4, as transformers writes and loads them.

Our NF4 codes are bitsandbytes' own; "<layer>.weight" stands for the codes, and with double quantization:

    weight.absmax         uint8 (blocks,)              without: float32
    weight.nested_absmax  float32 (blocks / 256,)
    weight.quant_map, weight.nested_quant_map          the two grids
    weight.quant_state.bitsandbytes__nf4               JSON as bytes: shape, block size, offset ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress_peft.errors import ModelError, Problem
from compress_peft.models.foreign.base import ForeignFormat, Tensors
from compress_peft.tensors import nf4
from compress_peft.weights import CompressedWeight, NF4Weight
from compress_peft.weights.compressed import dtype_name
from compress_peft.weights.parts import NF4Parts
from compress_peft.weights.storage import Spec

STATE = "weight.quant_state.bitsandbytes__nf4"


class BitsAndBytesFormat(ForeignFormat):
    """NF4, double quantized or not."""

    quant_method: ClassVar[str] = "bitsandbytes"
    kinds: ClassVar[tuple[str, ...]] = ("nf4",)
    suffixes: ClassVar[tuple[str, ...]] = (
        STATE,
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
    )

    def write(self, weight: CompressedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, NF4Weight)
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": weight.block_size,
            "dtype": dtype_name(weight.dtype),
            "shape": list(weight.shape),
        }
        stored = {"weight": weight.codes, "weight.quant_map": torch.tensor(nf4.NF4_VALUES)}
        if weight.absmax is not None:
            stored["weight.absmax"] = weight.absmax
        else:
            assert weight.absmax_codes is not None and weight.absmax_scales is not None
            assert weight.absmax_offset is not None
            stored["weight.absmax"] = weight.absmax_codes
            stored["weight.nested_absmax"] = weight.absmax_scales
            stored["weight.nested_quant_map"] = nf4.dynamic_map(torch.device("cpu")).clone()
            offset = float(weight.absmax_offset)
            state |= {"nested_blocksize": nf4.ABSMAX_GROUP, "nested_dtype": "float32", "nested_offset": offset}
        stored[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return stored

    def read(self, tensors: Tensors, settings: Mapping[str, Any]) -> CompressedWeight:
        state = json.loads(bytes(tensors[STATE].tolist()))
        grids = {"weight.quant_map": torch.tensor(nf4.NF4_VALUES)}
        if "nested_offset" in state:
            grids["weight.nested_quant_map"] = nf4.dynamic_map(torch.device("cpu"))
        strange = [name for name, grid in grids.items() if not torch.equal(tensors[name].float(), grid)]
        if strange or state.get("nested_blocksize", nf4.ABSMAX_GROUP) != nf4.ABSMAX_GROUP:
            what = f"its grid is not bitsandbytes' NF4: {', '.join(strange) or 'nested_blocksize'} differs"
            raise ModelError(Problem(STATE, what, "quantize the original model here: method: nf4"))
        shape = (int(state["shape"][0]), int(state["shape"][1]))
        codes = tensors["weight"].contiguous().view(torch.uint8).reshape(-1, 1)
        if "nested_offset" not in state:
            parts = NF4Parts(codes, shape, state["blocksize"], tensors["weight.absmax"].float())
        else:
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            double = (tensors["weight.absmax"], tensors["weight.nested_absmax"].float(), offset)
            parts = NF4Parts(codes, shape, state["blocksize"], None, *double)
        return NF4Weight(parts, torch.float32)

    def settings(self, specs: Mapping[str, Spec], dense: Sequence[str]) -> dict[str, Any]:
        first = next(iter(specs.values()))
        return {
            "quant_method": self.quant_method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": first["double_quant"],
            "bnb_4bit_compute_dtype": first["dtype"],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(dense),
        }

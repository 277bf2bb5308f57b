"""compressed-tensors folders, pack-quantized (llm-compressor, vLLM, transformers)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from compress_peft.export.base import EXPORTERS
from compress_peft.export.hf_folder import HFFolder
from compress_peft.models.foreign import CompressedTensorsFormat, ForeignFormat


@EXPORTERS.register
class CompressedTensorsFolder(HFFolder):
    """compressed-tensors format, pack-quantized: integer codes and zeros, by group or channel (vLLM: 4 or 8 bits)."""

    format: Literal["compressed-tensors"] = "compressed-tensors"

    def form(self, model: nn.Module | None = None) -> ForeignFormat:
        return CompressedTensorsFormat()

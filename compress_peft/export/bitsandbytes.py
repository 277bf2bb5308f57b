"""bitsandbytes' 4-bit folders: NF4, double quantized or not."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from compress_peft.export.base import EXPORTERS
from compress_peft.export.hf_folder import HFFolder
from compress_peft.models.foreign import BitsAndBytesFormat, ForeignFormat


@EXPORTERS.register
class BitsAndBytesFolder(HFFolder):
    """bitsandbytes NF4 format, which transformers loads with bitsandbytes' kernels."""

    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv 2305.14314"

    format: Literal["bitsandbytes"] = "bitsandbytes"

    def form(self, model: nn.Module | None = None) -> ForeignFormat:
        return BitsAndBytesFormat()

"""Writing models in the formats that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from compress_peft.errors import CorruptFile, Problem
from compress_peft.registry import Method, Registry
from compress_peft.weights import CompressedWeight

PROBE_TOKENS = 32


class Exporter(Method):
    """A format."""

    format: str
    """The name of the format."""

    tolerance: ClassVar[float] = 0.0
    """Largest difference of logits that the format may cause, relative to the largest logit."""

    def export(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
        """Write the model to a new folder, atomically; returns facts for the report."""
        raise NotImplementedError


EXPORTERS: Registry[Exporter] = Registry("export format", "format")


@torch.inference_mode()
def verify_reloaded(model: nn.Module, reloaded: nn.Module, tolerance: float, where: str) -> dict[str, Any]:
    """Compare a model with what was read back from its export: codes bit for bit, logits on fixed random tokens.

    Raises:
        CorruptFile: naming the layers whose codes differ, or the difference of the logits.
    """
    before, after = _compressed(model), _compressed(reloaded)
    different = [name for name in before if name not in after or not _same(before[name], after[name])]
    if different:
        what = f"{len(different)} of {len(before)} compressed weights were read back differently: {different[:5]}"
        raise CorruptFile(Problem(where, what, "export again; if it happens again, the disk or the format is at fault"))
    tokens = torch.randint(_vocabulary(model), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    logits = [m(tokens.to(next(m.parameters()).device), use_cache=False).logits.float() for m in (model, reloaded)]
    gap = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    if not gap <= tolerance:
        what = f"the logits differ by {gap:.2e} of the largest, the format allows {tolerance:.0e}"
        raise CorruptFile(Problem(where, what, "export again; if it happens again, the disk or the format is at fault"))
    return {"verified": True, "compressed_weights_equal": len(before), "largest_logit_difference": gap}


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _compressed(model: nn.Module) -> dict[str, CompressedWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, CompressedWeight)}


def _same(first: CompressedWeight, second: CompressedWeight) -> bool:
    left, right = first.components(), second.components()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)

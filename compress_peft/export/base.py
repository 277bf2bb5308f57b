"""Writing models in the formats that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from compress_peft.errors import CorruptFile, Problem
from compress_peft.models.foreign.base import Refusal, integer_zeros
from compress_peft.models.layers import is_encoder_decoder
from compress_peft.registry import Method, Registry
from compress_peft.weights import AffineWeight, CompressedWeight
from compress_peft.weights.inference import use_kernels
from compress_peft.weights.storage import Spec

PROBE_TOKENS = 32


class Exporter(Method):
    """A format."""

    format: str
    """The name of the format."""

    tolerance: ClassVar[float] = 0.0
    """Largest difference of logits that the format may cause, relative to the largest logit."""

    holds_adapters: ClassVar[bool] = False
    """Whether a bundle (backbone and adapter apart) can be written."""
    encoder_decoder: ClassVar[bool] = True
    """Whether it is a format for encoder-decoders (T5) too."""
    loadable: ClassVar[bool] = True
    """Whether `compress_peft.load` reads what was written; if not, `export` compares codes and logits itself."""

    def refusals(self, specs: dict[str, Spec]) -> list[Problem]:
        """Why compressed layers of these specs (by layer) do not fit, grouped by reason; told before loading."""
        return []

    def export(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
        """Write the model to a new folder, atomically; returns facts for the report."""
        raise NotImplementedError


EXPORTERS: Registry[Exporter] = Registry("export format", "format")


def grouped(refusals: dict[str, Refusal]) -> list[Problem]:
    """One problem a reason, with the layers that it concerns."""
    layers: dict[Refusal, list[str]] = {}
    for name, refusal in refusals.items():
        layers.setdefault(refusal, []).append(name)
    return [
        Problem(f"{len(names)} layers ({', '.join(names)})" if len(names) > 1 else names[0], what, fix)
        for (what, fix), names in layers.items()
    ]


@torch.inference_mode()
def verify_reloaded(model: nn.Module, reloaded: nn.Module, tolerance: float, where: str) -> dict[str, Any]:
    """Compare a model with what was read back from its export: codes bit for bit, logits on fixed random tokens.

    A model without an adapter gets this project's kernels, as what is read back has them: sums in another order would
    be a difference.

    Raises:
        CorruptFile: naming the layers whose codes differ, or the difference of the logits.
    """
    before, after = _compressed(model), _compressed(reloaded)
    different = [name for name in before if name not in after or not _same(before[name], after[name])]
    if different:
        what = f"{len(different)} of {len(before)} compressed weights were read back differently: {different[:5]}"
        raise CorruptFile(Problem(where, what, "export again; if it happens again, the disk or the format is at fault"))
    if not isinstance(model, PeftModel):  # its own layers stay as they are in training, in what is read back too
        use_kernels(model)
    gap = logit_gap(model, reloaded)
    if not gap <= tolerance:
        what = f"the logits differ by {gap:.2e} of the largest, the format allows {tolerance:.0e}"
        raise CorruptFile(Problem(where, what, "export again; if it happens again, the disk or the format is at fault"))
    return {"verified": True, "compressed_weights_equal": len(before), "largest_logit_difference": gap}


@torch.inference_mode()
def logit_gap(model: Any, other: Any) -> float:
    """Largest difference of the logits on fixed random tokens, relative to the largest logit of `model`."""
    size = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens.flip(1)} if is_encoder_decoder(model) else {})
    logits = []
    for m in (model, other):
        device = next(m.parameters()).device
        there = {name: ids.to(device) for name, ids in inputs.items()}
        logits.append(m(**there, use_cache=False).logits.float().cpu())
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def _compressed(model: nn.Module) -> dict[str, CompressedWeight]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, CompressedWeight)}


def _same(first: CompressedWeight, second: CompressedWeight) -> bool:
    left, right = first.components(), second.components()
    if isinstance(first, AffineWeight) and isinstance(second, AffineWeight):
        # Formats without symmetric grids write their zeros out, and float32 scales that float16 holds become that.
        left, right = ({**part, "scales": part["scales"].float()} for part in (left, right))
        left, right = left | {"zeros": integer_zeros(first)}, right | {"zeros": integer_zeros(second)}
        if first.bits != second.bits:
            return False
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)

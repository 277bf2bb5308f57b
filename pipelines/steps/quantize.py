"""`step: quantize`: replace the weights of linear layers by compressed ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from compress_peft.errors import ModelError, Problem
from compress_peft.models.save import save_model
from compress_peft.quantization import QUANTIZERS, quantize_model
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult
from pipelines.validation import nest


@STEPS.register
class Quantize(Step):
    """Quantize the weights of the linear layers in the decoder blocks."""

    step: Literal["quantize"] = "quantize"
    quantizer: QUANTIZERS.union()  # type: ignore[valid-type]
    """The method and its settings, written beside `step`."""

    forbids: ClassVar[dict[str, str]] = {
        "quantized": "the model is quantized already -> keep one quantize step",
        "adapted": "its adapter is not merged yet -> put a merge step before it, or quantize before finetune",
        "bundled": "a bundle keeps its adapter apart -> quantize before finetune",
        "exported": "the model is exported already -> put export last",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"quantized"})
    nested: ClassVar[str | None] = "quantizer"

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        return nest(values, "quantizer")

    def label(self) -> str:
        return f"quantized ({self.quantizer.method})"

    def run(self, state: RunState, folder: Path) -> StepResult:
        model, tokenizer = state.model()
        summary = quantize_model(model, self.quantizer)
        save_model(model, folder / "model", tokenizer)
        totals = {"bits_per_weight": summary.bits_per_weight, "relative_error": summary.relative_error}
        return StepResult(backbone=state.relative(folder / "model"), facts={**asdict(summary), **totals})

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        try:
            selected = shape.selected(self.quantizer)
        except ModelError as error:
            return [Problem(f"{where}.{problem.where}", problem.what, problem.fix) for problem in error.problems]
        reasons = {name: self.quantizer.check(size) for name, size in selected.items()}
        return [
            Problem(f"{where} ({name})", reason, "change the setting, or add the layer to skip")
            for name, reason in reasons.items()
            if reason is not None
        ]

    def estimate(self, shape: ModelShape) -> StepEstimate:
        before = shape.weight_bytes()
        shape.quantize(self.quantizer)
        after = shape.weight_bytes()
        return StepEstimate(
            memory=before + shape.largest_layer_bytes(), disk=after, note=f"{before / after:.1f}x smaller"
        )

"""`step: export`: write the deployable folder, and prove that it loads with the same codes and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from compress_peft.export import EXPORTERS, verify_reloaded
from compress_peft.loading import load
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult
from pipelines.validation import nest


@STEPS.register
class Export(Step):
    """Write the model in a format that others load."""

    step: Literal["export"] = "export"
    exporter: EXPORTERS.union()  # type: ignore[valid-type]
    """The format and its settings, written beside `step`."""

    forbids: ClassVar[dict[str, str]] = {
        "adapted": "its adapter is not merged yet -> put a merge step (e.g. policy: bundle) before it",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"exported"})
    nested: ClassVar[str | None] = "exporter"

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        return nest(values, "exporter")

    def label(self) -> str:
        return f"exported ({self.exporter.format}), reloaded"

    def run(self, state: RunState, folder: Path) -> StepResult:
        model, tokenizer = state.model()
        target = folder / "model"
        facts = self.exporter.export(model, tokenizer, target)
        reloaded, _ = load(target, state.device, state.dtype)
        facts |= verify_reloaded(model, reloaded, self.exporter.tolerance, str(target))
        facts["folder"] = state.relative(target)
        state.forget_model()  # what is measured from here on is what stands on disk
        return StepResult(backbone=state.relative(target), facts=facts)

    def estimate(self, shape: ModelShape) -> StepEstimate:
        size = shape.weight_bytes() + 4 * shape.adapter_parameters
        return StepEstimate(memory=2 * size, disk=size, note="")

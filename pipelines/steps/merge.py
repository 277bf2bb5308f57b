"""`step: merge`: make one deployable model of backbone and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress_peft.errors import Problem
from compress_peft.loading import load
from compress_peft.merging import MERGERS, Dense, MergeContext
from compress_peft.merging.compare import bits_per_weight, changed_bytes, compare_logits, sample_logits, stored
from compress_peft.models.bundle import save_folder
from compress_peft.models.sparsity import sparsity
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Alternative, Step, StepResult
from pipelines.steps.distill import Distill
from pipelines.steps.finetune import Finetune
from pipelines.validation import nest

COMPARED = 16
"""Texts of the validation split on which merged and unmerged logits are compared."""


@STEPS.register
class Merge(Step):
    """Merge the adapter into the backbone by one policy, and measure others beside it."""

    step: Literal["merge"] = "merge"
    merger: MERGERS.union()  # type: ignore[valid-type]
    """The policy and its settings, written beside `step`."""
    also: tuple[str, ...] = Field(default=(), description="Further policies whose outcome is saved and measured too.")

    needs: ClassVar[dict[str, str]] = {"adapted": "put a finetune step before it (or distill)"}
    forbids: ClassVar[dict[str, str]] = {"exported": "the model is exported already -> put export last"}
    adds: ClassVar[frozenset[str]] = frozenset({"merged"})
    removes: ClassVar[frozenset[str]] = frozenset({"adapted"})
    nested: ClassVar[str | None] = "merger"

    @classmethod
    def added_by(cls, raw: dict[str, Any]) -> frozenset[str]:
        return cls.adds | ({"bundled"} if raw.get("policy") == "bundle" else set())

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "merger" in values:
            return values
        rest = {key: value for key, value in values.items() if key != "also"}
        also = {"also": values["also"]} if "also" in values else {}
        return {**nest(rest, "merger"), **also}

    @model_validator(mode="after")
    def _known(self) -> Merge:
        for name in self.also:
            MERGERS[name]
        return self

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        states = frozenset[str]().union(*(step.states_added() for step in earlier))
        trained = [step.adapter for step in earlier if isinstance(step, Finetune | Distill)]
        adapters = [adapter for adapter in trained if adapter is not None]
        problems = []
        for merger in (self.merger, *(MERGERS.create(name) for name in self.also)):
            reason = merger.refusal(adapters[-1], states) if adapters else ""
            if reason:
                why, _, fix = reason.partition(" -> ")
                legal = [name for name in MERGERS if not MERGERS.create(name).refusal(adapters[-1], states)]
                fix = f"{fix}; or " * bool(fix) + f"use one of: {', '.join(legal)}"
                why = why.removeprefix("it ") if why.startswith("it ") else f"does not fit: {why}"
                problems.append(Problem(f"{where}.policy", f'policy "{merger.policy}" {why}', fix))
        return problems

    def label(self) -> str:
        return f"merged ({self.merger.policy})"

    def run(self, state: RunState, folder: Path) -> StepResult:
        facts = self._merge_into(self.merger, state, folder / "model")
        alternatives = []
        for name in self.also:
            other = MERGERS.create(name)
            state.forget_model()  # the first merge changed it; start again from backbone and adapter
            facts[f"also_{name}"] = self._merge_into(other, state, folder / name)
            alternatives.append(Alternative(f"merged ({name})", state.relative(folder / name)))
        state.forget_model()
        return StepResult(
            backbone=state.relative(folder / "model"), adapter="", facts=facts, alternatives=tuple(alternatives)
        )

    def _merge_into(self, merger: Any, state: RunState, target: Path) -> dict[str, Any]:
        model, tokenizer = state.model()
        context = MergeContext(original=lambda: load(state.source.folder, state.device, state.dtype)[0])
        if count := merger.prompts_needed():
            held_out = isinstance(merger, Dense)
            context.calibration = state.held_out_batches(count) if held_out else state.calibration_batches(count)
        texts = list(state.held_out_batches(COMPARED)) if state.recipe.data is not None else []
        reference, before, zeros = sample_logits(model, texts), stored(model), sparsity(model)
        merged = merger.merge(model, context=context)
        facts = {"policy": merger.policy, "exact": merger.exact, **context.facts}
        facts["against_unmerged"] = compare_logits(reference, sample_logits(merged, texts))
        facts |= changed_bytes(before, stored(merged))
        facts["bits_per_weight"] = bits_per_weight(merged)
        facts |= {} if zeros is None else {"sparsity_before": zeros, "sparsity_after": sparsity(merged)}
        save_folder(merged, target, tokenizer)
        return facts

    def estimate(self, shape: ModelShape) -> StepEstimate:
        size = shape.weight_bytes() + 4 * shape.adapter_parameters
        return StepEstimate(memory=2 * size, disk=size * (1 + len(self.also)), note="")

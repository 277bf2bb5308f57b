"""`step: merge`: make one deployable model of backbone and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress_peft.errors import Problem
from compress_peft.merging import MERGERS
from compress_peft.models.bundle import save_folder
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Alternative, Step, StepResult
from pipelines.steps.finetune import Finetune
from pipelines.validation import nest


@STEPS.register
class Merge(Step):
    """Merge the adapter into the backbone by one policy, and measure others beside it."""

    step: Literal["merge"] = "merge"
    merger: MERGERS.union()  # type: ignore[valid-type]
    """The policy and its settings, written beside `step`."""
    also: tuple[str, ...] = Field(default=(), description="Further policies whose outcome is saved and measured too.")

    needs: ClassVar[dict[str, str]] = {"adapted": "put a finetune step before it"}
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
        states = frozenset[str]().union(*(step.adds for step in earlier))
        adapters = [step.adapter for step in earlier if isinstance(step, Finetune)]
        problems = []
        for policy in (self.merger.policy, *self.also):
            for state, reason in MERGERS[policy].refuses.items():
                if state in states:
                    what = f'policy "{policy}" cannot take a {state} backbone: {reason}'
                    problems.append(Problem(f"{where}.policy", what, "use policy: bundle, or leave out that step"))
            if adapters and policy not in adapters[-1].merge_policies:
                what = f'policy "{policy}" cannot take the adapter "{adapters[-1].method}"'
                fix = f"use one of: {', '.join(adapters[-1].merge_policies)}"
                problems.append(Problem(f"{where}.policy", what, fix))
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
        calibration = state.calibration_batches(merger.prompts) if merger.needs_calibration else None
        merged = merger.merge(model, calibration)
        save_folder(merged, target, tokenizer)
        return {"policy": merger.policy, "exact": merger.exact}

    def estimate(self, shape: ModelShape) -> StepEstimate:
        size = shape.weight_bytes() + 4 * shape.adapter_parameters
        return StepEstimate(memory=2 * size, disk=size * (1 + len(self.also)), note="")

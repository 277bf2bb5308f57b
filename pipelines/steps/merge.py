"""`step: merge`: make one deployable model of backbone and adapter."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress_peft.errors import Problem
from compress_peft.loading import load
from compress_peft.merging import MERGERS, Dense, MergeContext
from compress_peft.merging.combine import Combination, How, folder_problem, load_combination
from compress_peft.merging.compare import (
    COMPARED_TOKENS,
    bits_per_weight,
    changed_bytes,
    compare_logits,
    sample_logits,
    stored,
)
from compress_peft.models.bundle import save_folder
from compress_peft.models.layers import linear_layers
from compress_peft.models.sparsity import sparsity
from compress_peft.registry import changed
from eval.memory import estimate_merging
from pipelines.calibration import calibration_text, check_calibration, overlap_notes
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Alternative, Step, StepResult
from pipelines.steps.distill import Distill
from pipelines.steps.finetune import Finetune
from pipelines.validation import nest

DENSE = ("dense", True)
"""The policy that auto does not choose on a quantized backbone."""
COMPARED = 16
"""Texts of the validation split on which merged and unmerged logits are compared."""

OWN = ("also", "adapters", "combine", "density", "seed")
"""Keys of the step itself; the others are settings of the policy."""


class WeightedAdapter(BaseModel):
    """An adapter and its weight: the one that this recipe trains, or one from a folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Literal["trained"] | None = None
    """trained: the adapter of this recipe's training."""

    path: str | None = None
    """A folder with an adapter of the same method on the same backbone: adapter_config.json and its weights."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """What its update is multiplied by."""

    @model_validator(mode="after")
    def _one(self) -> WeightedAdapter:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either name: trained or path: FOLDER")
        return self


@STEPS.register
class Merge(Step):
    """Merge the adapter into the backbone by one policy, and measure others beside it."""

    step: Literal["merge"] = "merge"
    merger: MERGERS.union()  # type: ignore[valid-type]
    """The policy and its settings, written beside `step`."""
    also: tuple[str, ...] = Field(default=(), description="Further policies whose outcome is saved and measured too.")
    adapters: tuple[WeightedAdapter, ...] = ()
    """Several adapters to merge as one; without it the trained one alone, as it is."""
    combine: How = "linear"
    """How `adapters` become one update: their weighted sum, TIES, or DARE before either."""
    density: float | None = Field(default=None, gt=0, lt=1)
    """The share of each update that ties and dare keep; default: 0.2 for ties, 0.5 for dare."""
    seed: int = 0
    """Decides what dare drops."""

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
        rest = {key: value for key, value in values.items() if key not in OWN}
        return {**nest(rest, "merger"), **{key: values[key] for key in OWN if key in values}}

    @model_validator(mode="after")
    def _known(self) -> Merge:
        for name in self.also:
            MERGERS[name]
        problems = []
        trained = [item for item in self.adapters if item.name is not None]
        paths = [item.path for item in self.adapters if item.path is not None]
        idle = changed(self, "combine", "density", "seed")
        if not self.adapters and idle:
            problems.append(f"{' and '.join(idle)} would do nothing: add adapters, or leave it out")
        if self.adapters and len(trained) != 1:
            problems.append("adapters: the one of this recipe is in it once: add {name: trained, weight: 1}")
        if len(set(paths)) < len(paths):
            problems.append("adapters: a folder is in it twice: add up the weights")
        if self.adapters and not paths:
            problems.append("adapters: there is no other adapter to combine with: add {path: FOLDER, weight: 1}")
        if self.combine == "linear" and self.density is not None:
            problems.append("density is for ties and dare: leave it out, or set combine")
        if (
            self.adapters
            and self.combine not in ("linear", "dare_linear")
            and any(item.weight <= 0 for item in self.adapters)
        ):
            problems.append(f"{self.combine} votes on signs, so that weights must be positive: use combine: linear")
        if problems:
            raise ValueError("; ".join(problems))
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
            elif adapters and self.adapters:
                kind = adapters[-1].method.upper()
                if reason := merger.combining(kind, self.combine):
                    what, _, fix = reason.partition(" -> ")
                    problems.append(Problem(f"{where}.adapters", what, fix))
        for index, item in enumerate(self.adapters):
            if item.path is not None:
                kind = adapters[-1].method.upper() if adapters else None
                if found := folder_problem(Path(item.path).expanduser(), kind):
                    at = f"{where}.adapters[{index}].path"
                    problems.append(Problem(at, f"{found.where} {found.what}", found.fix))
        return problems

    def _texts(self) -> list[Any]:
        """The policies that need calibration text."""
        mergers = (self.merger, *(MERGERS.create(name) for name in self.also))
        return [merger for merger in mergers if merger.text_needed() is not None]

    def requires_data(self) -> str | None:
        if all(merger.text_needed().text is not None for merger in self._texts()):
            return None
        return "compensate: gptq calibrates on the training split (or on calibration: {text: FILE})"

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        return [item for merger in self._texts() for item in check_calibration(merger.text_needed(), shape, where)]

    def leaves_bundle(self, earlier: list[Step]) -> bool:
        """Whether policy auto will have no choice but a bundle, told from the recipe alone."""
        states = frozenset[str]().union(*(step.states_added() for step in earlier))
        trained = [step.adapter for step in earlier if isinstance(step, Finetune | Distill)]
        if self.merger.policy != "auto" or not trained or trained[-1] is None:
            return False
        kept = [name for name, _ in self.merger.order if name != "bundle" and (name, "quantized" in states) != DENSE]
        return all(MERGERS.create(name).refusal(trained[-1], states) for name in kept)

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
        facts: dict[str, Any] = {"policy": merger.policy, "exact": merger.exact}
        if (settings := merger.text_needed()) is not None:
            context.text, facts["calibration"] = calibration_text(state, settings)
            for _, note in overlap_notes(state, context.text):
                print(f"warning: {note}", file=sys.stderr, flush=True)
        reference_model = model
        if self.adapters:
            context.combination, reference_model = self._combine(model)
            facts |= context.combination.facts()
        if count := merger.prompts_needed():
            held_out = isinstance(merger, Dense)
            context.calibration = state.held_out_batches(count) if held_out else state.calibration_batches(count)
        # One at a time, so that no more logits are worked out than are compared.
        texts = list(state.held_out_batches(COMPARED, batch_size=1)) if state.recipe.data is not None else []
        reference, before, zeros = sample_logits(reference_model, texts), stored(model), sparsity(model)
        del reference_model
        merged = merger.merge(model, context=context)
        facts |= context.facts
        facts["against_unmerged"] = compare_logits(reference, sample_logits(merged, texts))
        facts |= changed_bytes(before, stored(merged))
        facts["bits_per_weight"] = bits_per_weight(merged)
        facts |= {} if zeros is None else {"sparsity_before": zeros, "sparsity_after": sparsity(merged)}
        save_folder(merged, target, tokenizer)
        return facts

    def _combine(self, model: Any) -> tuple[Combination, Any]:
        """The adapters together, and the model that their merge is compared with: the adapted one where several can be
        active at once as they are combined, else all of them merged into dense weights."""
        trained = next(item.weight for item in self.adapters if item.path is None)
        others = {Path(item.path).expanduser(): item.weight for item in self.adapters if item.path is not None}
        combination = load_combination(model, trained, others, self.combine, self.density, self.seed)
        if combination.by_factors:
            return combination, model
        return combination, Dense(fill_zeros=True).merge(
            copy.deepcopy(model), context=MergeContext(combination=combination)
        )

    def estimate(self, shape: ModelShape) -> StepEstimate:
        size = shape.weight_bytes() + 4 * shape.adapter_parameters
        compares = shape.recipe is not None and shape.recipe.data is not None
        peaks = [
            estimate_merging(
                shape.model,
                size,
                compressed=shape.compressed_bytes(),
                new=self._new_bytes(merger, shape),
                length=shape.sequence_length if compares else 0,
                compared=COMPARED_TOKENS,
                bytes_each=shape.bytes_each,
            )
            for merger in (self.merger, *(MERGERS.create(name) for name in self.also))
        ]
        layers = dict(linear_layers(shape.model))
        peaks += [size + shape.walking(layers, ("hessian",), merger.text_needed()) for merger in self._texts()]
        return StepEstimate(memory=max(peaks), disk=size * (1 + len(self.also)), at_most=compares)

    def _new_bytes(self, merger: Any, shape: ModelShape) -> float:
        """Of the weights that a merge makes beside those that are there: dense ones, or codes and a copy of them."""
        several = shape.decompressed_bytes() if self.adapters else 0.0  # what the merge is compared with
        if isinstance(merger, Dense):
            original = 0.0 if merger.base == "dequantized" else float(shape.parameters * shape.bytes_each)
            return shape.decompressed_bytes() * (2 if merger.base == "auto" else 1) + original + several
        return 2 * shape.compressed_bytes() + several

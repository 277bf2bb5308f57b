"""`step: prune`: set weights of linear layers to zero, one by one or n of every m, or take out whole structures."""

from __future__ import annotations

import functools
import operator
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, model_validator
from torch import nn

from compress_peft.errors import ModelError, Problem
from compress_peft.models.needs import estimate_walk, prefers_out_of_core
from compress_peft.models.out_of_core import ACTIVATIONS_IN_MEMORY
from compress_peft.models.processes import current
from compress_peft.models.save import save_model
from compress_peft.models.selection import select_layers
from compress_peft.models.walk import WHOLE
from compress_peft.pruning import PRUNERS, prune_folder, prune_model
from compress_peft.pruning.structured import SHRINKERS, Shrinker
from compress_peft.quantization.apply import list_names
from compress_peft.registry import changed
from pipelines.calibration import calibration_text, check_calibration, overlap_notes
from pipelines.plan import ModelShape, StepEstimate
from pipelines.shrinking import check_shrink, estimate_shrink, run_shrink
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult
from pipelines.steps.quantize import FROM_DISK, goes_out_of_core
from pipelines.validation import nest

METHODS = Annotated[
    functools.reduce(operator.or_, [registry[name] for registry in (PRUNERS, SHRINKERS) for name in registry]),
    Discriminator("method"),
]


@STEPS.register
class Prune(Step):
    """Set weights of the linear layers in the decoder blocks to zero; every later step keeps them so. The
    structured methods (shortgpt, llm_pruner, flap, minitron, slicegpt) make the model physically smaller instead.

    Several prune steps after each other, with finetune and merge steps between them, make a gradual schedule: weights
    that are zero stay zero.
    """

    step: Literal["prune"] = "prune"
    pruner: METHODS  # type: ignore[valid-type]
    """The method and its settings, written beside `step`."""
    out_of_core: bool | Literal["auto"] = "auto"
    """true: load, prune and write one block at a time, so that the model never has to fit into memory; a killed run
    goes on at the block where it stopped. The result is the same, bit for bit. auto: when the dense model would take
    more than half of the memory that is available. On CPUs only; structured methods do without."""

    forbids: ClassVar[dict[str, str]] = {
        "quantized": "the model is quantized already, and codes are not chosen anew -> put prune before quantize",
        "adapted": "its adapter is not merged yet -> put a merge step before it, or prune before finetune",
        "bundled": "a bundle keeps its adapter apart -> prune before finetune",
        "exported": "the model is exported already -> put export last",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"pruned"})
    nested: ClassVar[str | None] = "pruner"

    @classmethod
    def added_by(cls, raw: dict[str, Any]) -> frozenset[str]:
        name = raw.get("method")
        if name in list(SHRINKERS):
            return frozenset({"shrunk"})
        quantizes = name in list(PRUNERS) and PRUNERS[name].quantizes(raw)
        return cls.adds | {"quantized"} if quantizes else cls.adds

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {key: value for key, value in values.items() if key == "out_of_core"}
        return nest({key: value for key, value in values.items() if key not in own}, "pruner") | own

    def shares_work(self) -> bool:
        return not isinstance(self.pruner, Shrinker) and not WHOLE & set(self.pruner.needs)

    def leaves_layers(self) -> bool:
        return not isinstance(self.pruner, Shrinker) and bool(changed(self.pruner, "targets", "skip"))

    def decoder_only(self) -> str:
        if isinstance(self.pruner, Shrinker):
            return f'"{self.pruner.method}" cuts the blocks of one stack -> prune single weights: method: magnitude'
        return FROM_DISK if self.out_of_core is True and self.pruner.calibrates else ""

    def label(self) -> str:
        if isinstance(self.pruner, Shrinker):
            return f"shrunk ({self.pruner.method} {100 * self.pruner.sparsity:g}%)"
        amount = self.pruner.pattern or f"{100 * self.pruner.sparsity:g}%"
        return f"pruned ({self.pruner.method} {amount})"

    def run(self, state: RunState, folder: Path) -> StepResult:
        if isinstance(self.pruner, Shrinker):
            return run_shrink(self.pruner, state, folder)
        blocks, calibration, notes = None, None, []
        if self.pruner.calibrates:
            blocks, calibration = calibration_text(state, self.pruner.calibration)
            notes = overlap_notes(state, blocks)
        work = folder / "checkpoints" / "walk"  # what stands under this name survives a kill
        out_of_core = goes_out_of_core(self.out_of_core, state, work, notes, "pruned", blocks is not None)
        processes = current()
        for _, note in notes if processes.leads else ():
            print(f"warning: {note}", file=sys.stderr, flush=True)
        if out_of_core:
            state.forget_model()
            summary = prune_folder(
                state.backbone,
                folder / "model",
                self.pruner,
                blocks,
                dtype=state.dtype,
                tokenizer=state.tokenizer(),
                work=work,
                trust_remote_code=state.recipe.model.trust_remote_code,
            )
        else:
            model, tokenizer = state.model()
            summary = prune_model(model, self.pruner, blocks)
            if processes.leads:
                save_model(model, folder / "model", tokenizer)
        facts = asdict(summary) | {
            "sparsity": summary.sparsity,
            "relative_error": summary.relative_error,
            "calibration": calibration,
            "out_of_core": out_of_core,
            "processes": processes.count,
            "notes": [*summary.notes, *notes],
        }
        return StepResult(backbone=state.relative(folder / "model"), facts=facts)

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        if not isinstance(self.pruner, Shrinker):
            return []
        problems = []
        if any("pruned" in step.states_added() for step in earlier):
            what = f'"{self.pruner.method}" cannot follow a step that prunes single weights'
            problems.append(Problem(where, what, "put it before that step"))
        if self.out_of_core is True:
            what = f'"{self.pruner.method}" needs the whole model in memory'
            problems.append(Problem(f"{where}.out_of_core", what, "leave it out"))
        return problems

    def requires_data(self) -> str | None:
        calibrates = isinstance(self.pruner, Shrinker) or self.pruner.calibrates
        if not calibrates or self.pruner.calibration.text is not None:
            return None
        return f'"{self.pruner.method}" calibrates on the training split (or on calibration: {{text: FILE}})'

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        if isinstance(self.pruner, Shrinker):
            return check_shrink(self.pruner, shape, where)
        problems = check_calibration(self.pruner.calibration, shape, where) if self.pruner.calibrates else []
        try:
            selected = self._selected(shape)
        except ModelError as error:
            return [*problems, *(Problem(f"{where}.{p.where}", p.what, p.fix) for p in error.problems)]
        reasons: dict[str, list[str]] = {}
        for name, layer in selected.items():
            if (reason := self.pruner.check((layer.out_features, layer.in_features))) is not None:
                reasons.setdefault(reason, []).append(name)
        fix = "change the setting, or add the layers to skip"
        return problems + [Problem(f"{where} ({list_names(names)})", reason, fix) for reason, names in reasons.items()]

    def estimate(self, shape: ModelShape) -> StepEstimate:
        if isinstance(self.pruner, Shrinker):
            return estimate_shrink(self.pruner, shape)
        size, selected = shape.weight_bytes(), self._selected(shape)
        weights = sum(layer.weight.numel() for layer in selected.values())
        note = f"{len(selected)} layers, about {self.pruner.sparsity * weights:,.0f} weights become zero"
        settings, needs = self.pruner.calibration, self.pruner.needs
        tokens = (settings.samples, settings.length) if self.pruner.calibrates else (0, 0)
        by_block = estimate_walk(
            shape.model,
            selected,
            lambda form: self.pruner.estimate_bits(form) or 8.0 * shape.bytes_each,
            shape.bytes_each,
            tokens,
            needs or ("norms",),
            ACTIVATIONS_IN_MEMORY,
            self.pruner.block_copies,
            self.pruner.keeps_activations,
        )
        before = shape.compressed_bytes()
        for name, layer in selected.items():
            if bits := self.pruner.estimate_bits((layer.out_features, layer.in_features)):
                shape.compress({name: layer.weight.numel() * bits / 8})
        auto = self.out_of_core == "auto" and prefers_out_of_core(shape.model, shape.bytes_each)
        if self.out_of_core is True or auto:
            note += "; block by block, the whole model is never in memory"
            return StepEstimate(memory=by_block.memory, disk=by_block.disk, note=note)
        calibration = settings if self.pruner.calibrates else None
        walk = shape.walking(selected, needs, calibration, self.pruner.block_copies, self.pruner.keeps_activations)
        if self.pruner.calibrates:
            note += f"; calibration on {tokens[0]} x {tokens[1]} tokens"
        made = (shape.compressed_bytes() - before) * shape.mapped  # zeros are written over the weights
        return StepEstimate(memory=size + made + walk, disk=shape.weight_bytes(), note=note)

    def _selected(self, shape: ModelShape) -> dict[str, nn.Linear]:
        return dict(select_layers(shape.model, self.pruner.targets, self.pruner.skip, "pruned")[0])

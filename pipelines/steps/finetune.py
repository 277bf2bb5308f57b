"""`step: finetune`: attach an adapter and train it on the task."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Literal

from compress_peft.adapters import ADAPTERS
from compress_peft.errors import Problem
from compress_peft.models.bundle import save_adapter
from compress_peft.training import TrainingSettings, train
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult


@STEPS.register
class Finetune(Step):
    """Train an adapter on the training split; the checkpoint with the best validation loss is kept."""

    step: Literal["finetune"] = "finetune"
    adapter: ADAPTERS.union()  # type: ignore[valid-type]
    """The PEFT method and its settings."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, schedule, evaluation, early stopping."""

    forbids: ClassVar[dict[str, str]] = {
        "adapted": "the model has an adapter already -> put a merge step before it",
        "exported": "the model is exported already -> put export last",
        "bundled": "a bundle keeps its adapter -> fine-tune before the merge step",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"adapted"})

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        reason = self.adapter.needs_dense()
        if reason and any("quantized" in step.states_added() for step in earlier):
            fix = "use another adapter, or leave out the quantize step"
            return [Problem(f"{where}.adapter", f"{reason}, and the backbone is quantized before", fix)]
        return []

    def label(self) -> str:
        return f"fine-tuned ({self.adapter.method})"

    def requires_data(self) -> str | None:
        return '"finetune" trains on data'

    def run(self, state: RunState, folder: Path) -> StepResult:
        model, tokenizer = state.model()
        data = state.data()
        model = self.adapter.attach(model)
        counts = self.adapter.parameter_counts(model)
        result = train(
            model,
            tokenizer,
            data.train,
            data.validation,
            self.training,
            max_length=state.data_settings().max_length,
            seed=state.recipe.seed,
            checkpoints=folder / "checkpoints",
            adapter=self.adapter,
        )
        state.replace_model(model)
        target = folder / "adapter"
        save_adapter(model, target)
        shutil.rmtree(folder / "checkpoints")  # everything needed from here on is in the adapter
        facts = {
            "trainable_parameters": counts,
            "changed_parameters": self.adapter.changed_parameters(model),
            "steps_done": result.progress.step,
            "steps_planned": result.total_steps,
            "stopped_early": result.stopped_early,
            "resumed_from_step": result.resumed_from,
            "curves": asdict(result.progress),
        }
        return StepResult(adapter=state.relative(target), facts=facts)

    def estimate(self, shape: ModelShape) -> StepEstimate:
        parameters = self.adapter.estimate_parameters(shape.model)
        shape.adapter_parameters += parameters
        tokens = self.training.batch_size * shape.sequence_length
        activations = shape.activation_bytes(tokens, self.training.gradient_checkpointing)
        states = parameters * 16  # float32 weight, gradient and Adam's two moments
        return StepEstimate(
            memory=shape.weight_bytes() + states + activations,
            disk=parameters * 4 * 5,  # adapter and two checkpoints with moments
            note=f"{parameters:,} trainable parameters",
        )

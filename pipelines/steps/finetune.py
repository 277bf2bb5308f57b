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
from eval.profile import Gauge
from pipelines.plan import ModelShape, StepEstimate
from pipelines.rank_search import RESULT, RankSearch, choose_rank, uses_search, with_rank
from pipelines.state import RunState, write_json
from pipelines.steps.base import STEPS, Step, StepResult, dense_problems


@STEPS.register
class Finetune(Step):
    """Train an adapter on the training split; the checkpoint with the best validation loss is kept."""

    step: Literal["finetune"] = "finetune"
    adapter: ADAPTERS.union()  # type: ignore[valid-type]
    """The PEFT method and its settings."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, schedule, evaluation, early stopping."""
    rank_search: RankSearch = RankSearch()
    """How `r: auto` of the adapter is found."""

    forbids: ClassVar[dict[str, str]] = {
        "adapted": "the model has an adapter already -> put a merge step before it",
        "exported": "the model is exported already -> put export last",
        "bundled": "a bundle keeps its adapter -> fine-tune before the merge step",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"adapted"})

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        return dense_problems(self.adapter, earlier, f"{where}.adapter")

    def label(self) -> str:
        return f"fine-tuned ({self.adapter.method})"

    def requires_data(self) -> str | None:
        return '"finetune" trains on data'

    def run(self, state: RunState, folder: Path) -> StepResult:
        model, tokenizer = state.model()
        data = state.data()
        adapter, search = self.adapter, None
        if uses_search(adapter):
            adapter, model, search = choose_rank(
                adapter,
                model,
                tokenizer,
                data.train,
                self.training,
                self.rank_search,
                max_length=state.data_settings().max_length,
                seed=state.recipe.seed,
                folder=folder / "checkpoints",
            )
        model = adapter.attach(model)
        counts = adapter.parameter_counts(model)
        gauge = Gauge(state.device)
        gauge.restart()
        result = train(
            model,
            tokenizer,
            data.train,
            data.validation,
            self.training,
            max_length=state.data_settings().max_length,
            seed=state.recipe.seed,
            checkpoints=folder / "checkpoints",
            adapter=adapter,
        )
        peak = {"bytes": gauge.peak(), "method": gauge.method}
        gauge.close()
        state.replace_model(model)
        target = folder / "adapter"
        save_adapter(model, target)
        shutil.rmtree(folder / "checkpoints")  # everything needed from here on is in the adapter
        if search is not None:
            write_json(target / RESULT, search)
        facts = {
            "trainable_parameters": counts,
            "changed_parameters": adapter.changed_parameters(model),
            "steps_done": result.progress.step,
            "steps_planned": result.total_steps,
            "stopped_early": result.stopped_early,
            "resumed_from_step": result.resumed_from,
            "seconds_per_step": result.progress.step_seconds / result.progress.step,
            "peak_memory": peak,  # of this process while it trained
            "curves": asdict(result.progress),
        } | ({} if search is None else {"rank_search": search})
        return StepResult(adapter=state.relative(target), facts=facts)

    def estimate(self, shape: ModelShape) -> StepEstimate:
        searched = uses_search(self.adapter)
        adapter = with_rank(self.adapter, max(self.rank_search.candidates)) if searched else self.adapter
        parameters = adapter.estimate_parameters(shape.model)
        shape.adapter_parameters += parameters
        needed = shape.training(parameters, self.training, added=parameters < shape.parameters // 2)
        sizes = {"gradients": needed.gradient_bytes, "optimizer": needed.optimizer_bytes}
        sizes["activations"] = needed.activation_bytes
        parts = "".join(f", {name} {size / 2**20:,.1f} MiB" for name, size in sizes.items())
        return StepEstimate(
            memory=needed.peak_bytes,
            disk=parameters * 4 * 5,  # adapter and two checkpoints with moments
            note=f"{'at most ' if searched else ''}{parameters:,} trainable parameters{parts}",
            at_most=True,  # texts may be shorter
        )

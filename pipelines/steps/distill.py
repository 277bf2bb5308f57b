"""`step: distill`: train the model, or an adapter on it, to say what a teacher says."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from compress_peft.adapters import ADAPTERS
from compress_peft.errors import Problem
from compress_peft.models.bundle import save_adapter
from compress_peft.models.save import save_model
from compress_peft.training import TrainingSettings, train
from compress_peft.training.distillation import LOSSES, ForwardKL, Objective
from compress_peft.training.distillation.cache import ROWS_PER_SHARD, position_bytes
from compress_peft.training.distillation.dense import DenseTraining
from compress_peft.training.distillation.generate import GenerationSettings
from compress_peft.training.distillation.on_policy import OnPolicy, OnPolicySettings
from compress_peft.training.distillation.rationales import RationaleSettings
from eval.memory import estimate_scoring
from pipelines.distillation import CACHED_TOKENS, cache_bytes, other_model, prepare
from pipelines.plan import ModelShape, StepEstimate
from pipelines.state import RunState
from pipelines.steps.base import STEPS, Step, StepResult, dense_problems
from pipelines.teacher import OTHER_TOKENS, teacher_problems, tokenizer_at_hand, vocabulary_problem


def _full(value: Any) -> Any:
    """ "full" for null."""
    return None if value == "full" else value


def _listed(value: Any) -> Any:
    """One loss for a list of it."""
    return value if isinstance(value, list | tuple) else [value]


LossList = Annotated[tuple[LOSSES.union(), ...], Field(min_length=1)]  # type: ignore[valid-type]
ON_POLICY = OnPolicySettings | float | None


def _on_policy(value: Any) -> Any:
    """0.5 for {share: 0.5}."""
    return {"share": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


@STEPS.register
class Distill(Step):
    """Train an adapter (or all weights of a dense model) against a teacher; the best validation loss is kept."""

    step: Literal["distill"] = "distill"
    teacher: str | int = "original"
    """original: the model that the recipe starts from; a stage by the number of its step (from 1) or by its name in the
    report; or any model, written as under model.source."""
    adapter: Annotated[
        ADAPTERS.union() | None,  # type: ignore[valid-type]
        BeforeValidator(_full, json_schema_input_type=ADAPTERS.union() | Literal["full"] | None),
    ]
    """The PEFT method that trains; null or full trains all weights of a dense model."""
    loss: Annotated[
        LossList,
        BeforeValidator(_listed, json_schema_input_type=LOSSES.union() | LossList),
    ] = (ForwardKL(),)
    """One loss or several that are added up with their weights; hard_labels stands for the data's own tokens."""
    data: Literal["responses", "text", "teacher_responses"] = "responses"
    """responses: those of the data set; text: its documents, cut into blocks, all tokens of which count;
    teacher_responses: the teacher answers the prompts of the training split once (sequence-level distillation)."""
    block_size: PositiveInt = 256
    """Tokens in a block of text."""
    on_policy: Annotated[OnPolicySettings | None, BeforeValidator(_on_policy, json_schema_input_type=ON_POLICY)] = None
    """On a share of the batches the student writes the responses itself, and the teacher says what it thinks of them
    (GKD): the share, or with settings. Needs live: true; js, reverse_kl and forward_kl are the paper's losses."""
    generation: GenerationSettings = GenerationSettings()
    """How the teacher writes responses or rationales."""
    rationales: RationaleSettings | None = None
    """Distilling step by step: reasons as a second task."""
    live: bool = False
    """true keeps the teacher in memory beside the student; otherwise its scores are written to disk first."""
    top_k: PositiveInt | None = None
    """Tokens of the teacher's distribution that are kept, beside the mass of all others; default: 256 on disk, all of
    them live. What is left out is a lower bound: the loss comes out smaller than over the whole vocabulary."""
    cache: str | None = None
    """A folder that keeps the teacher's scores for other runs; default: in the run folder, until the step is done."""
    score_batch_size: PositiveInt = 8
    """Rows that the teacher scores at once."""
    training: TrainingSettings = TrainingSettings()
    """Optimizer, schedule, evaluation, early stopping."""

    forbids: ClassVar[dict[str, str]] = {
        "adapted": "the model has an adapter already -> put a merge step before it",
        "exported": "the model is exported already -> put export last",
        "bundled": "a bundle keeps its adapter -> distil before the merge step",
    }
    adds: ClassVar[frozenset[str]] = frozenset({"distilled"})

    @classmethod
    def added_by(cls, raw: dict[str, Any]) -> frozenset[str]:
        return cls.adds | ({"adapted"} if raw.get("adapter") not in (None, "full") else set())

    @property
    def temperature(self) -> float:
        """Of the distribution losses."""
        return float(next((loss.temperature for loss in self.loss if loss.needs == "distribution"), 1.0))

    @property
    def compares(self) -> bool:
        """Whether a loss looks at what the teacher computes."""
        return any(loss.needs for loss in self.loss)

    @property
    def same_tokens(self) -> bool:
        """Whether a loss compares token by token, so that both models need one tokenizer."""
        return any(loss.needs in ("distribution", "activations") for loss in self.loss)

    @property
    def needs_teacher(self) -> bool:
        return self.compares or self.writes

    @property
    def writes(self) -> bool:
        """Whether the teacher writes text."""
        return self.data == "teacher_responses" or (self.rationales is not None and self.rationales.source == "teacher")

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        temperatures = {loss.temperature for loss in self.loss if loss.needs == "distribution"}
        if len(temperatures) > 1:
            raise ValueError(f"loss: all distribution losses need one temperature, not {sorted(temperatures)}")
        activations = [loss.method for loss in self.loss if loss.needs == "activations"]
        if activations and not self.live:
            raise ValueError(
                f"loss: {', '.join(activations)} compares activations, which are not cached; add live: true"
            )
        if other := [loss.method for loss in self.loss if loss.needs == "other_tokens"]:
            if self.same_tokens:
                raise ValueError(
                    f"loss: {', '.join(other)} is for a teacher with other tokens; add only hard_labels to it"
                )
            if not self.live or self.data != "responses" or self.rationales is not None:
                raise ValueError(f"loss: {', '.join(other)} reads the responses of the data with both; add live: true")
        if self.on_policy is not None and (not self.live or not self.same_tokens):
            raise ValueError(
                "on_policy: the teacher judges what the student has just written; add live: true and a loss such as js"
            )
        if self.on_policy is not None and any(loss.method == "hard_labels" for loss in self.loss):
            raise ValueError("on_policy: hard_labels would teach the student its own text; leave hard_labels out")
        if self.on_policy is not None and (self.data == "text" or self.rationales is not None):
            raise ValueError("on_policy: the student answers prompts; use data: responses without rationales")
        if self.cache is not None and self.live:
            raise ValueError("cache: with live: true nothing is cached; leave one of the two out")
        if self.rationales is not None and self.data != "responses":
            raise ValueError(f'rationales: belong to the responses of the data, and data is "{self.data}"')
        rows = self.training.batch_size * self.training.gradient_accumulation
        if self.rationales is not None and rows % 2:
            raise ValueError(
                f"training.batch_size: {rows} rows a step cannot hold both tasks of each problem; give an even number"
            )
        if self.data == "text" and self.adapter is not None and self.adapter.prompt_aware:
            raise ValueError(
                f"data: text has no prompts, and {self.adapter.method} reads the prompt; use data: responses"
            )
        return self

    def decoder_only(self) -> str:
        return "teacher and student continue the same row of tokens -> train with a finetune step"

    def label(self) -> str:
        return f"distilled ({self.adapter.method if self.adapter is not None else 'full'})"

    def requires_data(self) -> str | None:
        return '"distill" trains on data'

    def check_against(self, earlier: list[Step], where: str) -> list[Problem]:
        quantized = any("quantized" in step.states_added() for step in earlier)
        problems = teacher_problems(self.teacher, earlier, f"{where}.teacher") if self.needs_teacher else []
        if self.adapter is None and quantized:
            what = "null trains the weights themselves, and codes have no gradient; the backbone is quantized before"
            problems.append(Problem(f"{where}.adapter", what, "use an adapter, or leave out the quantize step"))
        if self.adapter is not None:
            problems += dense_problems(self.adapter, earlier, f"{where}.adapter")
        return problems

    def check(self, shape: ModelShape, where: str) -> list[Problem]:
        problems = []
        recipe, other = shape.recipe, other_model(self.teacher, shape)
        if other is not None and self.same_tokens:
            own = tokenizer_at_hand(recipe.model.source, recipe.model.trust_remote_code)
            found = tokenizer_at_hand(str(self.teacher), recipe.model.trust_remote_code)
            if own is not None and found is not None and (what := vocabulary_problem(own, found)):
                problems.append(Problem(f"{where}.teacher", what, OTHER_TOKENS))
        if recipe is not None and recipe.data is not None:
            if self.rationales is not None and self.rationales.source == "data" and recipe.data.rationale is None:
                fix = 'add the template data.rationale, e.g. "{explanation}", or rationales: {source: teacher}'
                problems.append(Problem(f"{where}.rationales", "the data section has no rationale", fix))
            asked = {"generation": self.generation.max_new_tokens} if self.writes else {}
            asked |= {"on_policy": self.on_policy.max_new_tokens} if self.on_policy is not None else {}
            for key, tokens in asked.items():
                if tokens >= recipe.data.max_length:
                    what = f"{tokens} leaves no room for the prompt in {recipe.data.max_length} tokens"
                    fix = "lower it, or raise data.max_length"
                    problems.append(Problem(f"{where}.{key}.max_new_tokens", what, fix))
        return problems

    def run(self, state: RunState, folder: Path) -> StepResult:
        lesson = prepare(self, state, folder)
        state.forget_model()  # a resumed step starts from the same model as a fresh one
        model, tokenizer = state.model()
        objective = Objective(self.loss, lesson.teacher, lesson.vocabulary, self.temperature, lesson.weights)
        longest = state.data_settings().max_length
        loss = objective if self.on_policy is None else OnPolicy(objective, self.on_policy, tokenizer, longest)
        torch.manual_seed(state.recipe.seed)  # whether the teacher was loaded before must not matter
        hooks: Any = self.adapter if self.adapter is not None else DenseTraining()
        model = hooks.attach(model)
        counts = hooks.parameter_counts(model)
        objective.attach(model)
        try:
            result = train(
                model,
                tokenizer,
                lesson.train,
                lesson.validation,
                self.training,
                max_length=longest,
                seed=state.recipe.seed,
                checkpoints=folder / "checkpoints",
                loss=loss,
                adapter=hooks,
                together=lesson.together,
            )
        finally:
            objective.detach(model)
        facts = lesson.facts | {
            "trainable_parameters": counts,
            "steps_done": result.progress.step,
            "steps_planned": result.total_steps,
            "stopped_early": result.stopped_early,
            "resumed_from_step": result.resumed_from,
            "curves": asdict(result.progress),
        }
        saved = self._save(model, state, folder, facts)
        del lesson, objective, loss  # closes the cache before it goes
        shutil.rmtree(folder / "checkpoints")
        return saved

    def _save(self, model: Any, state: RunState, folder: Path, facts: dict[str, Any]) -> StepResult:
        if self.adapter is None:
            save_model(model, folder / "model", state.tokenizer())
            state.forget_model()
            return StepResult(backbone=state.relative(folder / "model"), facts=facts)
        state.replace_model(model)
        facts["changed_parameters"] = self.adapter.changed_parameters(model)
        save_adapter(model, folder / "adapter")
        return StepResult(adapter=state.relative(folder / "adapter"), facts=facts)

    def estimate(self, shape: ModelShape) -> StepEstimate:
        teacher, known = 0.0, ""
        if self.needs_teacher:
            other = other_model(self.teacher, shape)
            teacher = shape.parameters * shape.bytes_each if other is None else other
            known = "" if teacher else "; the teacher's size is unknown until it is there"
        parameters = shape.parameters if self.adapter is None else self.adapter.estimate_parameters(shape.model)
        length = self.block_size if self.data == "text" else shape.sequence_length
        response = length if self.data != "responses" or self.rationales else shape.response_length(length)
        distilling = {
            "distilling": self.compares,
            "teacher_logits": self.live and (1 if self.top_k is not None else 3),
        }
        added = self.adapter is not None
        training = shape.training(parameters, self.training, added, length, response, **distilling).peak_bytes
        if added:
            shape.adapter_parameters += parameters
        cached = self.compares and not self.live
        disk = parameters * 4.0 * 5
        note = f"{parameters:,} trainable parameters{known}"
        if cached:
            kept, how = cache_bytes(self, shape, length)
            note += f"; the teacher's scores take {how}"
            disk += kept
        scoring = estimate_scoring(
            shape.model,
            teacher,
            rows=ROWS_PER_SHARD,
            batch=self.score_batch_size if cached else 0,
            length=length,
            response=response,
            position=position_bytes(self.top_k or CACHED_TOKENS),
        )
        peak = teacher + training if self.live else max(training, scoring if cached else teacher)
        return StepEstimate(memory=peak, disk=disk, note=note, at_most=self.data != "text")

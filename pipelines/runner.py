"""One run: steps in order, a measurement after each, everything on disk as soon as it is done."""

from __future__ import annotations

import json
import logging
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compress_peft.data.build import DataSettings, TaskData
from compress_peft.errors import CorruptFile, Problem
from compress_peft.models import processes
from compress_peft.models.sources import read_config, resolve_source
from compress_peft.weights import kernels
from eval.machine import describe_machine
from eval.records import (
    Curve,
    CurvePoint,
    DataFacts,
    ModelFacts,
    RunReport,
    SplitFacts,
    StageRecord,
    StepRecord,
)
from pipelines.folder import clear_unfinished, open_folder
from pipelines.measure import check_texts, measure
from pipelines.report import write_report
from pipelines.state import RunState, write_json
from pipelines.steps.base import Step, StepResult

log = logging.getLogger(__name__)


def resolved(recipe: Any) -> dict[str, Any]:
    """The recipe with all defaults, in the form in which it is written as YAML."""
    values: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    for step, raw in zip(recipe.steps, values["steps"], strict=True):
        if step.nested is not None:
            raw |= raw.pop(step.nested)
    return values


def run_recipe(recipe: Any, folder: Path, *, resume: bool, overwrite: bool, command: list[str]) -> Path:
    """Run, or go on with, a recipe; returns the path of report.html.

    Raises:
        UserError: see its subclasses; the folder keeps what is finished, and --resume goes on from there.
    """
    with open_folder(folder, resolved(recipe), resume=resume, overwrite=overwrite):
        started = _started(folder)
        _say("loading the model's source")
        source = resolve_source(recipe.model.source, recipe.model.config, recipe.seed)
        state = RunState(recipe, folder, source)
        if recipe.data is not None:
            state.data()  # wrong data must show before an hour of quantization
        check_texts(state)
        stages = [_stage(state, 0, "original")]
        steps = []
        for index, step in enumerate(recipe.steps):
            record, result = _step(state, index, step)
            steps.append(record)
            for alternative in result.alternatives:
                other = RunState(recipe, folder, source)
                other.backbone = folder / alternative.backbone
                other.share_data(state)
                name = _distinct(alternative.label, index, stages)
                stages.append(_stage(other, index + 1, name, quality_only=True))
            stages.append(_stage(state, index + 1, _distinct(step.label(), index, stages)))
        report = _report(state, stages, steps, started, command)
        return write_report(report, folder)


def follow_recipe(recipe: Any, folder: Path) -> None:
    """What all processes but the first do while that one is in `run_recipe`: their part of the shared steps."""
    state = None
    while True:
        try:
            task = processes.current().from_first(None)
        except RuntimeError:  # the connection is closed: the first process has stopped, and said why
            return
        if task is None:
            return
        index, backbone = task
        state = state or RunState(recipe, folder, resolve_source(recipe.model.source, recipe.model.config, recipe.seed))
        state.forget_model()
        state.backbone = backbone
        step = recipe.steps[index]
        torch.manual_seed(recipe.seed + index)
        step.run(state, _step_folder(folder, index, step))


def _step_folder(folder: Path, index: int, step: Step) -> Path:
    return folder / "steps" / f"{index + 1:02d}-{step.step}"


def _distinct(label: str, index: int, stages: list[StageRecord]) -> str:
    """The label, with the number of the step if an earlier one has the same, as in a gradual schedule."""
    return f"{label}, step {index + 1}" if label in {stage.name for stage in stages} else label


def _say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def _started(folder: Path) -> datetime:
    """When the run was started first; kept over resumptions."""
    path = folder / "started.json"
    if not path.exists():
        write_json(path, datetime.now(UTC).isoformat())
    return datetime.fromisoformat(_read_json(path))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        fix = "delete the file to do this part again, then --resume"
        raise CorruptFile(Problem(str(path), f"cannot be read: {error}", fix)) from error


def _step(state: RunState, index: int, step: Step) -> tuple[StepRecord, StepResult]:
    """Run the step, or take its result from an earlier session."""
    folder = _step_folder(state.folder, index, step)
    path = folder / "result.json"
    done = path.exists()
    if done:
        result = StepResult.from_json(_read_json(path))
        _say(f"step {index + 1} {step.label()}: done before")
        state.forget_model()
    else:
        clear_unfinished(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _say(f"step {index + 1} {step.label()}")
        torch.manual_seed(state.recipe.seed + index)  # whatever ran before in this process must not matter
        begin = time.monotonic()
        if step.shares_work():
            processes.current().from_first((index, state.backbone))
            result = step.run(state, folder)
        else:
            with processes.alone():
                result = step.run(state, folder)
        result = result.after(time.monotonic() - begin)
        write_json(path, result.to_json())
    state.apply(result)
    facts = {"step": step.step, "settings": step.model_dump(mode="json"), **result.facts}
    return StepRecord(name=step.label(), seconds=result.seconds, details=facts, resumed=done), result


def _stage(state: RunState, index: int, name: str, quality_only: bool = False) -> StageRecord:
    """Measure the stage, or take the measurement from an earlier session."""
    slug = "".join(char if char.isalnum() else "-" for char in name).strip("-")
    path = state.folder / "stages" / f"{index:02d}-{slug}.json"
    if path.exists():
        return StageRecord.model_validate(_read_json(path))
    _say(f"measuring: {name}")
    record = measure(state, name, quality_only)
    write_json(path, record.model_dump(mode="json"))
    _say("  " + _headline(record))
    return record


def _headline(record: StageRecord) -> str:
    parts = [f"{score.metric} {score.value:.1%} of {score.n}" for score in record.accuracies[:1]]
    if record.perplexity is not None:
        parts.append(f"perplexity {record.perplexity.value:.2f}")
    if record.storage is not None:
        parts.append(f"weights {record.storage.memory_bytes / 1e6:.0f} MB")
    if record.latency is not None:
        parts.append(f"decode {record.latency.decode_tokens_per_second.median:.1f} tokens/s")
    return ", ".join(parts)


def _data_facts(data: TaskData, settings: DataSettings, task: str | None = None) -> DataFacts:
    """task: name of a further task, of whose data nothing but the test split is used."""
    facts = data.facts()
    used = facts["splits"] if task is None else {"test": facts["splits"]["test"]}
    return DataFacts(
        name=task or facts["name"],
        source=settings.source or "",
        licence=facts["licence"],
        splits=tuple(
            SplitFacts(name=name, size=split["examples"], sha256=split["sha256"]) for name, split in used.items()
        ),
        details=facts["details"],
    )


def _report(
    state: RunState, stages: list[StageRecord], steps: list[StepRecord], started: datetime, command: list[str]
) -> RunReport:
    recipe = state.recipe
    config = read_config(state.source.folder)
    data = [] if recipe.data is None else [_data_facts(state.data(), recipe.data)]
    data += [_data_facts(task.built, task.data, task.name) for task in state.tasks() if task.data is not recipe.data]
    original = stages[0].storage
    name = state.source.facts.get("repository") or state.source.facts.get("file") or recipe.model.source
    return RunReport(
        name=recipe.name,
        title=" → ".join([str(name), *(step.label() for step in recipe.steps)]),
        started=started,
        finished=datetime.now(UTC),
        command=" ".join(["python -m pipelines.run", *(shlex.quote(word) for word in command[1:])]),
        recipe=resolved(recipe),
        seed=recipe.seed,
        machine=describe_machine(),
        model=ModelFacts(
            name=name,
            source=recipe.model.source,
            architecture=", ".join(config.get("architectures") or [config.get("model_type", "")]),
            parameters=original.parameters if original else 0,
            details=state.source.facts,
        ),
        data=tuple(data),
        steps=tuple(steps),
        curves=tuple(curve for step in steps for curve in _curves(step)),
        stages=tuple(stages),
        notes=(*state.source.notes, *_step_notes(steps), f"Compressed layers run on: {kernels.active(state.device)}."),
    )


def _step_notes(steps: list[StepRecord]) -> list[str]:
    """What the steps found unusual; of the same remark on many layers the first and their number."""
    told = []
    for step in steps:
        places: dict[str, list[str]] = {}
        for where, what in step.details.get("notes") or ():
            places.setdefault(what, []).append(where)
        for what, where in places.items():
            more = f" and {len(where) - 1} more" if len(where) > 1 else ""
            told.append(": ".join(part for part in (step.name, f"{where[0]}{more}", what) if part))
    return told


def _curves(step: StepRecord) -> list[Curve]:
    curves = step.details.get("curves")
    if not curves:
        return []
    return [
        Curve(name=name, points=tuple(CurvePoint(step=p["step"], value=p["loss"]) for p in curves[key]))
        for name, key in (("training", "losses"), ("validation", "validations"))
    ]

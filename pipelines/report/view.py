"""The figures of a report as text, the same for Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from eval.columns import (
    DECODE,
    RUN,
    WEIGHTS,
    Row,
    accuracy_change,
    accuracy_text,
    harness_text,
    known_columns,
    megabytes,
    perplexity_change,
    seconds_text,
    signed,
    table_rows,
    text_score,
)
from eval.records import DataFacts, RunReport, StageRecord
from pipelines.report.merges import merge_rows
from pipelines.report.speed import grid_rows, speed_table


@dataclass(frozen=True)
class Loss:
    """A stage against another one, with significance."""

    name: str
    against: str
    accuracy: str
    perplexity: str


@dataclass(frozen=True)
class View:
    headline: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    losses: tuple[Loss, ...]
    merges: tuple[tuple[str, ...], ...]
    further_scores: tuple[tuple[str, str, str], ...]
    protocol: tuple[str, ...]
    storage: tuple[tuple[str, str], ...]
    speed_labels: tuple[str, ...]
    speed: tuple[tuple[str, ...], ...]
    grid: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    steps: tuple[tuple[str, str, str], ...]
    splits: tuple[tuple[str, str, int, str], ...]
    recipe_yaml: str
    notes: tuple[str, ...]
    duration: str


def build_view(report: RunReport) -> View:
    columns = known_columns(report.stages)
    speed_labels, speed = speed_table(report.stages)
    return View(
        headline=headline(report),
        columns=tuple(column.label for column in columns),
        rows=table_rows([stage.name for stage in report.stages], report.stages, columns),
        losses=_losses(report),
        merges=merge_rows(report),
        further_scores=tuple(
            (stage.name, f"{score.metric}{', ' + score.task if score.task else ''}", accuracy_text(score))
            for stage in report.stages
            for score in stage.accuracies[1:]
        )
        + tuple((stage.name, *harness_text(score)) for stage in report.stages for score in stage.harness)
        + tuple((stage.name, *text_score(score)) for stage in report.stages for score in stage.texts),
        protocol=_protocol(report),
        storage=tuple((stage.name, _storage_text(stage)) for stage in report.stages if stage.storage),
        speed_labels=speed_labels,
        speed=speed,
        grid=grid_rows(report.stages),
        facts=_facts(report),
        steps=tuple(
            (step.name + (" (resumed)" if step.resumed else ""), seconds_text(step.seconds), _details(step.details))
            for step in report.steps
        ),
        splits=tuple((d.name, s.name, s.size, s.sha256) for d in report.data for s in d.splits),
        recipe_yaml=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        notes=(*report.notes, *(f"{s.name}: {note}" for s in report.stages for note in s.notes)),
        duration=seconds_text((report.finished - report.started).total_seconds()),
    )


def headline(report: RunReport) -> str:
    """What became of the model, in one sentence with figures: the last stage with a score against the first."""
    measured = [stage for stage in report.stages if stage.accuracy or stage.perplexity] or report.stages
    if not measured:
        return f"{report.model.name}: nothing was measured."
    first, last = measured[0], measured[-1]
    parts = []
    if first.accuracy and last.accuracy:
        a, b = first.accuracy, last.accuracy
        parts.append(
            f"accuracy from {a.value:.1%} to {b.value:.1%} ({(b.value - a.value) * 100:+.1f} points, n = {b.n})"
        )
    elif first.perplexity and last.perplexity:
        parts.append(f"perplexity from {first.perplexity.value:.2f} to {last.perplexity.value:.2f}")
    for column, label in ((WEIGHTS, "weights"), (RUN, "peak memory of the whole process"), (DECODE, "decoding")):
        before, after = column.value(first), column.value(last)
        if before and after is not None:
            unit = "tokens/s" if column is DECODE else "MB"
            change = signed(after / before - 1)
            parts.append(f"{label} from {column.text(first)} to {column.text(last)} {unit} ({change})")
    if not parts:
        return f"{report.model.name}: nothing was measured."
    return f"{report.model.name}, {first.name} against {last.name}: " + ", ".join(parts) + "."


def _losses(report: RunReport) -> tuple[Loss, ...]:
    """Each stage against the one before it, and the last one against the first."""
    stages = report.stages
    pairs = list(pairwise(stages))
    if len(stages) > 2:
        pairs.append((stages[0], stages[-1]))
    return tuple(
        Loss(after.name, before.name, accuracy_change(before, after), perplexity_change(before, after))
        for before, after in pairs
    )


def _protocol(report: RunReport) -> tuple[str, ...]:
    lines = []
    scored = next((stage.accuracy for stage in report.stages if stage.accuracy), None)
    if scored:
        task = f" on {scored.task}" if scored.task else ""
        lines.append(f"Accuracy: {scored.metric}{task}, {scored.n} examples, 95% Wilson interval.")
    text = next((stage.perplexity for stage in report.stages if stage.perplexity), None)
    if text:
        lines.append(f"Perplexity: {text.protocol}; {text.tokens:,} predicted tokens; 95% t-interval over blocks.")
    near = next((stage.fidelity for stage in report.stages if stage.fidelity), None)
    if near:
        lines.append(f"Against the original: {near.protocol}; 95% t-interval over blocks.")
    memory = next((stage.memory for stage in report.stages if stage.memory), None)
    if memory:
        lines.append(
            f"Peak memory: fresh process, {memory.method}, of which {megabytes(memory.baseline_bytes)} MB are the "
            "interpreter and its libraries; keys and values "
            f"{megabytes(memory.kv_cache_bytes)} MB. 1 MB = 10^6 bytes."
        )
    speed = next((stage.latency for stage in report.stages if stage.latency), None)
    if speed:
        lines.append(
            f"Speed: {speed.device}, {speed.threads} threads, {speed.dtype}, batch {speed.batch}, "
            f"{speed.prompt_tokens} prompt tokens, {speed.new_tokens} new tokens, greedy, one warm-up, "
            f"median of {speed.repeats}."
        )
    lines.append("Changes are relative to the first stage; the best figure of a column is bold.")
    return tuple(lines)


def _storage_text(stage: StageRecord) -> str:
    assert stage.storage is not None
    kinds = ("codes", "scales", "dense_linear", "embeddings", "adapter", "other")
    sizes = [(kind.replace("_", " "), getattr(stage.storage, kind)) for kind in kinds]
    parts = [f"{name} {megabytes(size)} MB" for name, size in sizes if size]
    if stage.storage.adapter_parameters:
        parts.append(f"{stage.storage.adapter_parameters:,} adapter parameters")
    if stage.storage.sparsity is not None:
        parts.append(f"{stage.storage.sparsity:.1%} of the weights of the pruned layers are zero")
    return ", ".join(parts)


def _facts(report: RunReport) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    machine, model = report.machine, report.model
    bandwidth = f"{machine.read_bandwidth / 1e9:.1f} GB/s reading" if machine.read_bandwidth else ""
    model_rows = [
        ("Name", model.name),
        ("Source", model.source),
        ("Architecture", model.architecture),
        ("Parameters", f"{model.parameters:,}" if model.parameters else ""),
        ("Details", _details(model.details)),
    ]
    data_rows = [
        (data.name, "; ".join(filter(None, [data.source, data.licence and f"licence: {data.licence}", _preset(data)])))
        for data in report.data
    ]
    machine_rows = [
        ("Processor", f"{machine.cpu} {' '.join(machine.cpu_features)}".strip()),
        (
            "Cores",
            f"{machine.physical_cores} physical, {machine.logical_cores} logical, {machine.threads} threads used",
        ),
        ("Memory", f"{machine.ram_bytes / 2**30:.1f} GiB" + (f", {bandwidth}" if bandwidth else "")),
        ("GPU", ", ".join(machine.gpus) or "none"),
        ("System", machine.os),
        ("Software", ", ".join(f"{k} {v}" for k, v in {"Python": machine.python, **machine.versions}.items())),
    ]
    groups = (("Model", model_rows), ("Data", data_rows), ("Machine", machine_rows))
    return tuple((title, tuple(row for row in rows if row[1])) for title, rows in groups if rows)


def _preset(data: DataFacts) -> str:
    return f"preset {data.details['preset']}: {data.details['paper']}" if "preset" in data.details else ""


def _details(details: dict[str, Any]) -> str:
    """Scalars and short lists; long ones (curves, per-layer figures) stay in report.json."""
    parts = []
    for key, value in details.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, dict):
            inner = _details(value)
            value = f"({inner})" if inner else ""
        elif isinstance(value, list | tuple):
            value = f"{len(value)} entries" if len(value) > 4 or any(isinstance(v, dict) for v in value) else value
        text = str(value)
        if value is None or not text:
            continue
        parts.append(f"{key.replace('_', ' ')}: {text if len(text) <= 300 else text[:297] + '...'}")
    return ", ".join(parts)

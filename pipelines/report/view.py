"""The figures of a report as text, the same for Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from compress_peft.errors import DataError
from eval.compare import compare_accuracy, compare_perplexity
from eval.records import Accuracy, RunReport, StageRecord

NOT_MEASURED = "n/a"


@dataclass(frozen=True)
class Cell:
    """One figure: value with its unit in the column's head, its change, and how the change is to be seen."""

    text: str
    interval: str = ""
    change: str = ""
    verdict: str = ""
    """"better", "worse" or "" (equal, first stage, or nothing to compare)."""
    best: bool = False


@dataclass(frozen=True)
class Column:
    label: str
    value: Callable[[StageRecord], float | None]
    text: Callable[[StageRecord], str]
    higher_is_better: bool
    points: bool = False
    """The change is a difference in percentage points, not a ratio."""
    interval: Callable[[StageRecord], str] = lambda stage: ""


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]


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
    further_scores: tuple[tuple[str, str, str], ...]
    protocol: tuple[str, ...]
    storage: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    steps: tuple[tuple[str, str, str], ...]
    splits: tuple[tuple[str, str, int, str], ...]
    recipe_yaml: str
    notes: tuple[str, ...]
    duration: str


def build_view(report: RunReport) -> View:
    columns = [column for column in COLUMNS if any(column.value(stage) is not None for stage in report.stages)]
    return View(
        headline=headline(report),
        columns=tuple(column.label for column in columns),
        rows=_rows(report, columns),
        losses=_losses(report),
        further_scores=tuple(
            (stage.name, f"{score.metric}{', ' + score.task if score.task else ''}", accuracy_text(score))
            for stage in report.stages
            for score in stage.accuracies[1:]
        ),
        protocol=_protocol(report),
        storage=tuple((stage.name, _storage_text(stage)) for stage in report.stages if stage.storage),
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
    measured = [stage for stage in report.stages if stage.accuracy or stage.perplexity]
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
    for column, label in ((_WEIGHTS, "weights"), (_RUN, "peak memory of the whole process"), (_DECODE, "decoding")):
        before, after = column.value(first), column.value(last)
        if before and after is not None:
            unit = "tokens/s" if column is _DECODE else "MB"
            change = _signed(after / before - 1)
            parts.append(f"{label} from {column.text(first)} to {column.text(last)} {unit} ({change})")
    return f"{report.model.name}, {first.name} against {last.name}: " + ", ".join(parts) + "."


def accuracy_text(score: Accuracy) -> str:
    return f"{score.value:.1%} ({_accuracy_interval(score)})"


def _accuracy_interval(score: Accuracy | None) -> str:
    return f"{score.low * 100:.1f} to {score.high * 100:.1f}" if score else ""


def _perplexity_interval(stage: StageRecord) -> str:
    p = stage.perplexity
    return f"{p.low:.2f} to {p.high:.2f}" if p and math.isfinite(p.high) else ""


def _perplexity(stage: StageRecord) -> float | None:
    return stage.perplexity.value if stage.perplexity else None


def _megabytes(get: Callable[[StageRecord], float | None]) -> Callable[[StageRecord], str]:
    def text(stage: StageRecord) -> str:
        value = get(stage)
        return "" if value is None else megabytes(value)

    return text


def megabytes(value: float) -> str:
    """Megabytes (10^6 bytes), three digits or more."""
    size = value / 1e6
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def seconds_text(value: float) -> str:
    if value >= 90:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def _weights(stage: StageRecord) -> float | None:
    return stage.storage.memory_bytes if stage.storage else None


def _disk(stage: StageRecord) -> float | None:
    return stage.storage.disk_bytes if stage.storage else None


def _bits(stage: StageRecord) -> float | None:
    return stage.storage.bits_per_weight if stage.storage else None


def _load(stage: StageRecord) -> float | None:
    return stage.memory.load_peak_bytes if stage.memory else None


def _run(stage: StageRecord) -> float | None:
    return stage.memory.run_peak_bytes if stage.memory else None


def _prefill(stage: StageRecord) -> float | None:
    return stage.latency.prefill_seconds.median if stage.latency else None


def _decode(stage: StageRecord) -> float | None:
    return stage.latency.decode_tokens_per_second.median if stage.latency else None


def _fixed(get: Callable[[StageRecord], float | None], digits: int) -> Callable[[StageRecord], str]:
    def text(stage: StageRecord) -> str:
        value = get(stage)
        return "" if value is None else f"{value:.{digits}f}"

    return text


_WEIGHTS = Column("Weights, MB", _weights, _megabytes(_weights), False)
_RUN = Column("Peak run, MB", _run, _megabytes(_run), False)
_DECODE = Column("Decode, tok/s", _decode, _fixed(_decode, 1), True)
COLUMNS = (
    Column(
        "Accuracy",
        lambda stage: stage.accuracy.value if stage.accuracy else None,
        lambda stage: f"{stage.accuracy.value:.1%}" if stage.accuracy else "",
        True,
        points=True,
        interval=lambda stage: _accuracy_interval(stage.accuracy),
    ),
    Column("Perplexity", _perplexity, _fixed(_perplexity, 2), False, interval=_perplexity_interval),
    _WEIGHTS,
    Column("On disk, MB", _disk, _megabytes(_disk), False),
    Column("Bits per weight", _bits, _fixed(_bits, 2), False),
    Column("Peak load, MB", _load, _megabytes(_load), False),
    _RUN,
    Column("Prefill, s", _prefill, _fixed(_prefill, 3), False),
    _DECODE,
)


def _rows(report: RunReport, columns: list[Column]) -> tuple[Row, ...]:
    cells: dict[str, list[Cell]] = {stage.name: [] for stage in report.stages}
    for column in columns:
        values = [column.value(stage) for stage in report.stages]
        known = [value for value in values if value is not None]
        best = max(known) if column.higher_is_better else min(known)
        for stage, value in zip(report.stages, values, strict=True):
            if value is None:
                cells[stage.name].append(Cell(NOT_MEASURED))
                continue
            change = verdict = ""
            reference = values[0]
            if stage is not report.stages[0] and reference is not None:
                difference = value - reference if column.points else value / reference - 1 if reference else 0.0
                change = f"{difference * 100:+.1f} pts" if column.points else _signed(difference)
                if abs(difference) >= 0.0005:
                    verdict = "better" if (difference > 0) == column.higher_is_better else "worse"
            is_best = value == best and len(set(known)) > 1
            cells[stage.name].append(Cell(column.text(stage), column.interval(stage), change, verdict, is_best))
    return tuple(Row(stage.name, tuple(cells[stage.name])) for stage in report.stages)


def _signed(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 0.1 else f"{share:+.0%}"


def _losses(report: RunReport) -> tuple[Loss, ...]:
    """Each stage against the one before it, and the last one against the first."""
    stages = report.stages
    pairs = list(pairwise(stages))
    if len(stages) > 2:
        pairs.append((stages[0], stages[-1]))
    return tuple(
        Loss(after.name, before.name, _accuracy_change(before, after), _perplexity_change(before, after))
        for before, after in pairs
    )


def _accuracy_change(before: StageRecord, after: StageRecord) -> str:
    if before.accuracy is None or after.accuracy is None:
        return NOT_MEASURED
    try:
        c = compare_accuracy(before.accuracy, after.accuracy)
    except DataError:
        return "not comparable (other examples or metric)"
    if c.changed == 0:
        return f"+0.0 points, the same answer to all {c.n} examples"
    return (
        f"{c.difference * 100:+.1f} points ({c.low * 100:+.1f} to {c.high * 100:+.1f}), "
        f"{c.gained} gained, {c.lost} lost, {_p(c.p_value)}"
    )


def _perplexity_change(before: StageRecord, after: StageRecord) -> str:
    if before.perplexity is None or after.perplexity is None:
        return NOT_MEASURED
    try:
        c = compare_perplexity(before.perplexity, after.perplexity)
    except DataError:
        return "not comparable (other text)"
    if c.low == c.high == c.ratio == 1:
        return "identical"
    interval = f" ({c.low - 1:+.1%} to {c.high - 1:+.1%})" if math.isfinite(c.high) else ""
    return f"{c.ratio - 1:+.1%}{interval}, {_p(c.p_value)}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _protocol(report: RunReport) -> tuple[str, ...]:
    lines = []
    scored = next((stage.accuracy for stage in report.stages if stage.accuracy), None)
    if scored:
        task = f" on {scored.task}" if scored.task else ""
        lines.append(f"Accuracy: {scored.metric}{task}, {scored.n} examples, 95% Wilson interval.")
    text = next((stage.perplexity for stage in report.stages if stage.perplexity), None)
    if text:
        lines.append(f"Perplexity: {text.protocol}; {text.tokens:,} predicted tokens; 95% t-interval over blocks.")
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
        (data.name, "; ".join(filter(None, [data.source, data.licence and f"licence: {data.licence}"])))
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

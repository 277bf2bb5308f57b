"""The columns of every table of stages, and how figures and their changes are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress_peft.errors import DataError
from eval.records import Accuracy, HarnessScore, StageRecord, TextScore
from eval.significance import compare_accuracy, compare_perplexity

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
    nothing: float = 0.0
    """A first stage with no more than this has nothing that the others could be a share of: no change is told."""


@dataclass(frozen=True)
class Row:
    name: str
    cells: tuple[Cell, ...]


def harness_text(score: HarnessScore) -> tuple[str, str]:
    """What was scored, and the value with its standard error."""
    shots = f", {score.num_fewshot} shots" if score.num_fewshot else ""
    size = f", n = {score.n}" if score.n else ""
    error = "" if score.stderr is None else f" ± {score.stderr:.4g} (standard error)"
    return f"lm-eval {score.task}: {score.metric}{shots}{size}", f"{score.value:.4g}{error}"


def text_score(score: TextScore) -> tuple[str, str]:
    """What was scored, and the value with its interval."""
    task = f", {score.task}" if score.task else ""
    if not score.share:
        return f"{score.metric}{task}", f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
    return f"{score.metric}{task}", f"{score.value:.1%} ({score.low * 100:.1f} to {score.high * 100:.1f})"


def accuracy_text(score: Accuracy) -> str:
    return f"{score.value:.1%} ({accuracy_interval(score)})"


def accuracy_interval(score: Accuracy | None) -> str:
    return f"{score.low * 100:.1f} to {score.high * 100:.1f}" if score else ""


def _perplexity_interval(stage: StageRecord) -> str:
    p = stage.perplexity
    return f"{p.low:.2f} to {p.high:.2f}" if p and math.isfinite(p.high) else ""


def _perplexity(stage: StageRecord) -> float | None:
    return stage.perplexity.value if stage.perplexity else None


def _answer_loss(stage: StageRecord) -> float | None:
    return stage.answer_loss.value if stage.answer_loss else None


def _answer_loss_interval(stage: StageRecord) -> str:
    found = stage.answer_loss
    return f"{found.low:.4f} to {found.high:.4f}" if found and math.isfinite(found.high) else ""


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


WEIGHTS = Column("Weights, MB", _weights, _megabytes(_weights), False)


def _estimated(stage: StageRecord) -> float | None:
    return stage.memory.estimate.peak_bytes if stage.memory and stage.memory.estimate else None


def _divergence(stage: StageRecord) -> float | None:
    return stage.fidelity.kl if stage.fidelity else None


NO_DIVERGENCE = 1e-6
"""KL of a model with itself, up to rounding."""


def _divergence_text(stage: StageRecord) -> str:
    value = _divergence(stage)
    if value is None or value <= NO_DIVERGENCE:
        return "" if value is None else "0"
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2g}"


def _divergence_interval(stage: StageRecord) -> str:
    f = stage.fidelity
    return f"{f.low:.2g} to {f.high:.2g}" if f and f.kl > NO_DIVERGENCE and math.isfinite(f.high) else ""


def _same_token(stage: StageRecord) -> float | None:
    return stage.fidelity.token_agreement if stage.fidelity else None


def _continued(stage: StageRecord) -> float | None:
    return stage.fidelity.continued if stage.fidelity else None


def _percent(get: Callable[[StageRecord], float | None]) -> Callable[[StageRecord], str]:
    def text(stage: StageRecord) -> str:
        value = get(stage)
        return "" if value is None else f"{value:.1%}"

    return text


RUN = Column("Peak run, MB", _run, _megabytes(_run), False)
DECODE = Column("Decode, tok/s", _decode, _fixed(_decode, 1), True)
COLUMNS = (
    Column(
        "Accuracy",
        lambda stage: stage.accuracy.value if stage.accuracy else None,
        lambda stage: f"{stage.accuracy.value:.1%}" if stage.accuracy else "",
        True,
        points=True,
        interval=lambda stage: accuracy_interval(stage.accuracy),
    ),
    Column("Perplexity", _perplexity, _fixed(_perplexity, 2), False, interval=_perplexity_interval),
    Column("Answer loss, nats", _answer_loss, _fixed(_answer_loss, 4), False, interval=_answer_loss_interval),
    Column(
        "KL to original, nats",
        _divergence,
        _divergence_text,
        False,
        interval=_divergence_interval,
        nothing=NO_DIVERGENCE,
    ),
    Column("Same token", _same_token, _percent(_same_token), True, points=True),
    Column("Same continuation", _continued, _percent(_continued), True, points=True),
    WEIGHTS,
    Column("On disk, MB", _disk, _megabytes(_disk), False),
    Column("Bits per weight", _bits, _fixed(_bits, 2), False),
    Column("Peak load, MB", _load, _megabytes(_load), False),
    RUN,
    Column("Estimated run, MB", _estimated, _megabytes(_estimated), False),
    Column("Prefill, s", _prefill, _fixed(_prefill, 3), False),
    DECODE,
)


def known_columns(stages: Sequence[StageRecord]) -> list[Column]:
    """Those columns that have a figure for at least one stage."""
    return [column for column in COLUMNS if any(column.value(stage) is not None for stage in stages)]


def table_rows(names: Sequence[str], stages: Sequence[StageRecord], columns: Sequence[Column]) -> tuple[Row, ...]:
    """One row a stage; changes are relative to the first stage."""
    cells: list[list[Cell]] = [[] for _ in stages]
    for column in columns:
        values = [column.value(stage) for stage in stages]
        known = [value for value in values if value is not None]
        best = max(known) if column.higher_is_better else min(known)
        for index, (stage, value) in enumerate(zip(stages, values, strict=True)):
            if value is None:
                cells[index].append(Cell(NOT_MEASURED))
                continue
            change = verdict = ""
            reference = values[0]
            if index and reference is not None and (column.points or abs(reference) > column.nothing):
                difference = value - reference if column.points else value / reference - 1
                change = f"{round(difference * 100, 1) + 0.0:+.1f} pts" if column.points else signed(difference)
                if abs(difference) >= 0.0005:
                    verdict = "better" if (difference > 0) == column.higher_is_better else "worse"
            is_best = value == best and len(set(known)) > 1
            cells[index].append(Cell(column.text(stage), column.interval(stage), change, verdict, is_best))
    return tuple(Row(name, tuple(row)) for name, row in zip(names, cells, strict=True))


def signed(share: float) -> str:
    return f"{round(share * 100, 1) + 0.0:+.1f}%" if abs(share) < 0.1 else f"{share:+.0%}"  # never -0.0


def accuracy_change(before: StageRecord, after: StageRecord) -> str:
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
        f"{c.gained} gained, {c.lost} lost, {p_text(c.p_value)}"
    )


def perplexity_change(before: StageRecord, after: StageRecord) -> str:
    if before.perplexity is None or after.perplexity is None:
        return NOT_MEASURED
    try:
        c = compare_perplexity(before.perplexity, after.perplexity)
    except DataError:
        return "not comparable (other text)"
    if c.low == c.high == c.ratio == 1:
        return "identical"
    interval = f" ({c.low - 1:+.1%} to {c.high - 1:+.1%})" if math.isfinite(c.high) else ""
    return f"{c.ratio - 1:+.1%}{interval}, {p_text(c.p_value)}"


def p_text(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"

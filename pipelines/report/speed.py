"""Tables of speed: each stage in full, and at further batch sizes, prompt lengths and beams."""

from __future__ import annotations

from collections.abc import Sequence

from eval.costs import Latency, Timing
from eval.records import StageRecord

LABELS = (
    "Stage", "First token, ms", "Per token, ms", "Decode, tok/s", "Of memory bandwidth", "J per token", "Other load",
)  # fmt: skip
GRID_LABELS = ("Stage", "Rows", "Prompt tokens", "Beams", "First token, ms", "Decode, tok/s")


def speed_table(stages: Sequence[StageRecord]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """(labels, rows); a column that no stage has a figure for is left out."""
    rows = [(stage.name, *_cells(stage.latency)) for stage in stages if stage.latency is not None]
    kept = [index for index in range(len(LABELS)) if any(row[index] for row in rows)]
    return tuple(LABELS[index] for index in kept), tuple(tuple(row[index] or "-" for index in kept) for row in rows)


def _cells(speed: Latency) -> tuple[str, ...]:
    reached = speed.bandwidth_share
    return (
        _spread(speed.prefill_seconds, 1e3),
        f"{speed.token_seconds * 1e3:.3g}",
        _spread(speed.decode_tokens_per_second),
        "" if reached is None else f"{reached:.0%} of {(speed.read_bandwidth or 0) / 1e9:.3g} GB/s",
        "" if speed.joules_per_token is None else f"{speed.joules_per_token:.3g} ({speed.energy_source})",
        "" if speed.other_load is None else f"{speed.other_load:.0%}",
    )


def _spread(timing: Timing, factor: float = 1.0) -> str:
    """Median, and all that lay around it."""
    middle, low, high = (f"{factor * value:.4g}" for value in (timing.median, timing.min, timing.max))
    return f"{middle} ({low} to {high})"


def grid_rows(stages: Sequence[StageRecord]) -> tuple[tuple[str, ...], ...]:
    """The further timings of all stages, under GRID_LABELS."""
    return tuple(
        (
            stage.name,
            str(point.batch),
            str(point.prompt_tokens),
            str(point.beams),
            _spread(point.prefill_seconds, 1e3),
            _spread(point.decode_tokens_per_second),
        )
        for stage in stages
        if stage.latency is not None
        for point in stage.latency.grid
    )

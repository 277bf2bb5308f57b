"""Quality against cost: one point a stage, with intervals, and the front of those that nothing beats."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.figures import GRID, INK, MARKERS, Plot, colour, neighbours, new_axes, to_svg
from eval.records import StageRecord

Interval = tuple[float, float, float]
"""Value, lower end, upper end."""


@dataclass(frozen=True)
class Cost:
    """What quality is drawn against."""

    name: str
    label: str
    hint: str
    lower_is_better: bool
    value: Callable[[StageRecord], Interval | None]


def _memory(stage: StageRecord) -> Interval | None:
    return (stage.memory.run_peak_bytes / 1e6,) * 3 if stage.memory else None


def _speed(stage: StageRecord) -> Interval | None:
    if stage.latency is None:
        return None
    timing = stage.latency.decode_tokens_per_second
    return timing.median, timing.min, timing.max


def _disk(stage: StageRecord) -> Interval | None:
    disk = stage.storage.disk_bytes if stage.storage else None
    return None if disk is None else (disk / 1e6,) * 3


MEMORY = Cost("memory", "Peak memory at run, MB", "smaller is better", True, _memory)
LATENCY = Cost("latency", "Decoding, tokens/s", "larger is better", False, _speed)
DISK = Cost("disk", "On disk, MB", "smaller is better", True, _disk)


def quality_of(stages: Sequence[StageRecord]) -> str:
    """ "accuracy" where any stage has one, else "perplexity"."""
    return "accuracy" if any(stage.accuracy for stage in stages) else "perplexity"


def scatter(names: Sequence[str], stages: Sequence[StageRecord], cost: Cost, front: bool = False) -> Plot | None:
    """Quality against this cost, for the page; None with fewer than two points. front: draw the Pareto front."""
    drawn = _draw(names, stages, cost, front, INK, GRID)
    if drawn is None:
        return None
    figure, points = drawn
    quality = quality_of(stages)
    legend = tuple((f"{index + 1} {name}", colour(index)) for index, name, *_ in points)
    listing = "; ".join(f"{i + 1} {name}: {x[0]:.4g}, {y[0]:.4g}" for i, name, x, y in points)
    title = f"{quality.capitalize()} against {cost.name}"
    return Plot(title, f"{cost.label} and {quality}: {listing}", to_svg(figure, cost.name), legend)


def scatter_png(names: Sequence[str], stages: Sequence[StageRecord], cost: Cost, front: bool = False) -> bytes | None:
    """The same as a PNG on white, with the legend in the picture."""
    drawn = _draw(names, stages, cost, front, "#1d2129", "#d9dce1")
    if drawn is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D

    figure, points = drawn
    longest = max(len(name) for _, name, *_ in points)
    figure.set_size_inches(6 + 0.08 * longest, max(4.5, 0.25 * len(points)))  # what 9 points take beside the axes
    handles = [
        Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=colour(i), linestyle="", label=f"{i + 1} {name}")
        for i, name, *_ in points
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    figure.patch.set_alpha(1)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def pareto_front(points: Sequence[tuple[float, float]], lower_x: bool, lower_y: bool) -> list[int]:
    """Indices of the points to which no other is better in one direction and at least as good in the other, by x."""

    def beaten(index: int) -> bool:
        x, y = signed[index]
        return any((a <= x and b < y) or (a < x and b <= y) for a, b in signed)

    signed = [(x if lower_x else -x, y if lower_y else -y) for x, y in points]
    return sorted((index for index in range(len(points)) if not beaten(index)), key=lambda index: points[index])


def _quality(stage: StageRecord, kind: str) -> Interval | None:
    """Value and interval, accuracy in percent."""
    if kind == "accuracy":
        a = stage.accuracy
        return (100 * a.value, 100 * a.low, 100 * a.high) if a else None
    if stage.perplexity is None:
        return None
    p = stage.perplexity
    return (p.value, p.low, p.high) if math.isfinite(p.high) else (p.value, p.value, p.value)


def _draw(
    names: Sequence[str], stages: Sequence[StageRecord], cost: Cost, front: bool, ink: str, grid: str
) -> tuple[Any, list[tuple[int, str, Interval, Interval]]] | None:
    quality = quality_of(stages)
    points = []
    for index, (name, stage) in enumerate(zip(names, stages, strict=True)):
        x, y = cost.value(stage), _quality(stage, quality)
        if x is not None and y is not None:
            points.append((index, name, x, y))
    if len(points) < 2:
        return None
    figure, axes = new_axes(ink, grid)
    if front:
        places = [(x[0], y[0]) for _, _, x, y in points]
        best = pareto_front(places, cost.lower_is_better, quality == "perplexity")
        axes.plot(
            [places[i][0] for i in best], [places[i][1] for i in best], color=ink, linewidth=1, linestyle="--", zorder=1
        )
    for index, _, x, y in points:
        axes.errorbar(
            x[0],
            y[0],
            xerr=[[x[0] - x[1]], [x[2] - x[0]]],
            yerr=[[y[0] - y[1]], [y[2] - y[0]]],
            fmt=MARKERS[index % len(MARKERS)],
            color=colour(index),
            markersize=9,
            alpha=0.9,
            elinewidth=1.2,
            capsize=3,
        )
    axes.margins(0.14)
    axes.set_xlabel(f"{cost.label} ({cost.hint})")
    axes.set_ylabel("Accuracy, %" if quality == "accuracy" else "Perplexity (smaller is better)")
    figure.canvas.draw()
    for group in neighbours(points, axes):
        _, _, x, y = group[0]
        numbers = ", ".join(str(index + 1) for index, *_ in group)
        axes.annotate(
            numbers, (x[0], y[0]), xytext=(9, 9), textcoords="offset points", color=ink, weight="bold", size=12
        )
    return figure, points

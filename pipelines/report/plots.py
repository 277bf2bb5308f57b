"""Plots as inline SVG whose text and lines take the page's colours, so that they suit light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.records import RunReport, StageRecord

INK, GRID = "#010203", "#040506"
"""Placeholders in the drawing, replaced by the page's custom properties."""
PALETTE = ("#4c8bf5", "#e8710a", "#2fa36b", "#c3509c", "#b58900", "#7a6ff0", "#d9534f", "#3aa6b9")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Plot:
    title: str
    description: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """Text and colour of each entry."""


def draw_all(report: RunReport) -> list[Plot]:
    """Those plots for which there are data; three at most."""
    quality = "accuracy" if any(stage.accuracy for stage in report.stages) else "perplexity"
    candidates = [
        _scatter(report, quality, "memory", "Peak memory at run, MB", _memory, "smaller is better"),
        _scatter(report, quality, "latency", "Decoding, tokens/s", _speed, "larger is better"),
        _losses(report),
    ]
    return [plot for plot in candidates if plot is not None]


def stage_colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _memory(stage: StageRecord) -> tuple[float, float, float] | None:
    if stage.memory is None:
        return None
    return (stage.memory.run_peak_bytes / 1e6,) * 3


def _speed(stage: StageRecord) -> tuple[float, float, float] | None:
    if stage.latency is None:
        return None
    timing = stage.latency.decode_tokens_per_second
    return timing.median, timing.min, timing.max


def _quality(stage: StageRecord, kind: str) -> tuple[float, float, float] | None:
    """Value and interval, accuracy in percent."""
    if kind == "accuracy":
        a = stage.accuracy
        return (100 * a.value, 100 * a.low, 100 * a.high) if a else None
    if stage.perplexity is None:
        return None
    p = stage.perplexity
    return (p.value, p.low, p.high) if math.isfinite(p.high) else (p.value, p.value, p.value)


def _scatter(
    report: RunReport,
    quality: str,
    name: str,
    label: str,
    place: Callable[[StageRecord], tuple[float, float, float] | None],
    hint: str,
) -> Plot | None:
    points = []
    for index, stage in enumerate(report.stages):
        x, y = place(stage), _quality(stage, quality)
        if x is not None and y is not None:
            points.append((index, stage.name, x, y))
    if len(points) < 2:
        return None
    figure, axes = _axes()
    for index, _, x, y in points:
        axes.errorbar(
            x[0],
            y[0],
            xerr=[[x[0] - x[1]], [x[2] - x[0]]],
            yerr=[[y[0] - y[1]], [y[2] - y[0]]],
            fmt=MARKERS[index % len(MARKERS)],
            color=stage_colour(index),
            markersize=9,
            alpha=0.9,
            elinewidth=1.2,
            capsize=3,
        )
    axes.margins(0.14)
    axes.set_xlabel(f"{label} ({hint})")
    axes.set_ylabel("Accuracy, %" if quality == "accuracy" else "Perplexity (smaller is better)")
    figure.canvas.draw()
    for group in _neighbours(points, axes):
        _, _, x, y = group[0]
        numbers = ", ".join(str(index + 1) for index, *_ in group)
        axes.annotate(
            numbers, (x[0], y[0]), xytext=(9, 9), textcoords="offset points", color=INK, weight="bold", size=12
        )
    legend = tuple((f"{index + 1} {stage}", stage_colour(index)) for index, stage, *_ in points)
    listing = "; ".join(f"{i + 1} {stage}: {x[0]:.4g}, {y[0]:.4g}" for i, stage, x, y in points)
    quality_name = quality.capitalize()
    return Plot(f"{quality_name} against {name}", f"{label} and {quality}: {listing}", _svg(figure, name), legend)


def _neighbours(points: list[Any], axes: Any) -> list[list[Any]]:
    """Points whose labels would collide (closer than 22 by 16 screen units) share one."""
    groups: list[list[Any]] = []
    for point in points:
        here = axes.transData.transform((point[2][0], point[3][0]))
        for group in groups:
            there = axes.transData.transform((group[0][2][0], group[0][3][0]))
            if abs(here[0] - there[0]) < 22 and abs(here[1] - there[1]) < 16:
                group.append(point)
                break
        else:
            groups.append([point])
    return groups


def _losses(report: RunReport) -> Plot | None:
    curves = [curve for curve in report.curves if curve.points]
    if not curves:
        return None
    figure, axes = _axes()
    for index, curve in enumerate(curves):
        steps = [point.step for point in curve.points]
        values = [point.value for point in curve.points]
        few = len(steps) <= 25
        axes.plot(steps, values, color=stage_colour(index), linewidth=1.8, marker="o" if few else None, markersize=5)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel(curves[0].metric.capitalize())
    axes.xaxis.get_major_locator().set_params(integer=True)
    listing = "; ".join(f"{c.name} from {c.points[0].value:.4g} to {c.points[-1].value:.4g}" for c in curves)
    legend = tuple((curve.name, stage_colour(index)) for index, curve in enumerate(curves))
    return Plot("Training", f"Loss over the optimizer's steps: {listing}", _svg(figure, "loss"), legend)


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=11, length=0)
    for item in (axes.xaxis.label, axes.yaxis.label):
        item.set_color(INK)
        item.set_fontsize(12)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """The figure without fixed size, metadata and prolog; ids are unique on the page by the salt."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: (bold )?([\d.]+px)[^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for placeholder, variable in ((INK, "var(--ink)"), (GRID, "var(--line)")):
        svg = svg.replace(placeholder, variable)
    return svg.strip()

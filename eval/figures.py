"""Plots as inline SVG whose text and lines take the page's colours, so that they suit light, dark and print."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

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


def colour(index: int) -> str:
    """The colour of the entry of this number."""
    return PALETTE[index % len(PALETTE)]


def new_axes(ink: str = INK, grid: str = GRID) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, labelsize=11, length=0)
    for item in (axes.xaxis.label, axes.yaxis.label):
        item.set_color(ink)
        item.set_fontsize(12)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grid)
    return figure, axes


def to_svg(figure: Any, name: str) -> str:
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


def neighbours(points: list[Any], axes: Any) -> list[list[Any]]:
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

"""The plots of a run."""

from __future__ import annotations

from eval.figures import Plot, colour, new_axes, to_svg
from eval.records import RunReport
from eval.scatter import LATENCY, MEMORY, scatter


def draw_all(report: RunReport) -> list[Plot]:
    """Those plots for which there are data; four at most."""
    names = [stage.name for stage in report.stages]
    candidates = [
        scatter(names, report.stages, MEMORY),
        scatter(names, report.stages, LATENCY),
        _throughput(report),
        _losses(report),
    ]
    return [plot for plot in candidates if plot is not None]


AXES = (("batch", "Rows in a batch"), ("prompt_tokens", "Prompt tokens"), ("beams", "Beams"))


def _throughput(report: RunReport) -> Plot | None:
    """Decoding against the first of batch size, prompt length and beams that was varied; the others at their first."""
    grids = {s.name: s.latency.grid for s in report.stages if s.latency is not None and s.latency.grid}
    points = [point for grid in grids.values() for point in grid]
    varied = [(name, label) for name, label in AXES if len({getattr(point, name) for point in points}) > 1]
    if not varied:
        return None
    field, label = varied[0]
    fixed = {name: getattr(points[0], name) for name, _ in AXES if name != field}
    figure, axes = new_axes()
    for index, grid in enumerate(grids.values()):
        line = [point for point in grid if all(getattr(point, name) == value for name, value in fixed.items())]
        line.sort(key=lambda point: getattr(point, field))
        rates = [point.decode_tokens_per_second for point in line]
        middle = [rate.median for rate in rates]
        below_above = [[rate.median - rate.min for rate in rates], [rate.max - rate.median for rate in rates]]
        places = [getattr(point, field) for point in line]
        axes.errorbar(places, middle, below_above, color=colour(index), linewidth=1.8, marker="o", markersize=5)
    axes.set_xscale("log", base=2)
    ticks = sorted({getattr(point, field) for point in points})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("Decoding, tokens/s")
    legend = tuple((name, colour(index)) for index, name in enumerate(grids))
    units = {"batch": "row", "prompt_tokens": "prompt token", "beams": "beam"}
    at = ", ".join(f"{value} {units[name]}{'s' if value != 1 else ''}" for name, value in fixed.items())
    return Plot("Throughput", f"Tokens a second by {label.lower()}, at {at}", to_svg(figure, "speed"), legend)


def _losses(report: RunReport) -> Plot | None:
    curves = [curve for curve in report.curves if curve.points]
    if not curves:
        return None
    figure, axes = new_axes()
    for index, curve in enumerate(curves):
        steps = [point.step for point in curve.points]
        values = [point.value for point in curve.points]
        few = len(steps) <= 25
        axes.plot(steps, values, color=colour(index), linewidth=1.8, marker="o" if few else None, markersize=5)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel(curves[0].metric.capitalize())
    axes.xaxis.get_major_locator().set_params(integer=True)
    listing = "; ".join(f"{c.name} from {c.points[0].value:.4g} to {c.points[-1].value:.4g}" for c in curves)
    legend = tuple((curve.name, colour(index)) for index, curve in enumerate(curves))
    return Plot("Training", f"Loss over the optimizer's steps: {listing}", to_svg(figure, "loss"), legend)

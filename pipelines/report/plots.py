"""The plots of a run."""

from __future__ import annotations

from eval.figures import Plot, colour, new_axes, to_svg
from eval.records import RunReport
from eval.scatter import LATENCY, MEMORY, scatter


def draw_all(report: RunReport) -> list[Plot]:
    """Those plots for which there are data; three at most."""
    names = [stage.name for stage in report.stages]
    candidates = [
        scatter(names, report.stages, MEMORY),
        scatter(names, report.stages, LATENCY),
        _losses(report),
    ]
    return [plot for plot in candidates if plot is not None]


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

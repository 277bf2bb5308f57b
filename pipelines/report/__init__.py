"""report.json and what is made of it: report.md and a self-contained report.html."""

from __future__ import annotations

from pathlib import Path

from eval.records import RunReport
from eval.reports import read_report, render_template, write_file

__all__ = ["read_report", "render", "write_report"]


def write_report(report: RunReport, folder: str | Path) -> Path:
    """Writes report.json, report.md and report.html into the folder, each atomically; returns the last's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    return render(folder)


def render(folder: str | Path) -> Path:
    """Makes report.md and report.html from report.json alone; returns the path of report.html."""
    from pipelines.report.merges import LABELS
    from pipelines.report.plots import draw_all
    from pipelines.report.speed import GRID_LABELS
    from pipelines.report.view import build_view

    folder = Path(folder)
    report = read_report(folder)
    view = build_view(report)
    for name, escape in (("report.md", False), ("report.html", True)):
        plots = draw_all(report) if escape else []
        labels = {"merge_labels": LABELS, "grid_labels": GRID_LABELS}
        text = render_template(
            "pipelines.report", f"{name}.j2", escape, view=view, report=report, plots=plots, **labels
        )
        write_file(folder / name, text)
    return folder / "report.html"

"""A comparison as files: a page, tables, plots and plain numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas

from compress_peft.errors import ConfigError, Problem
from eval.comparison import Comparison
from eval.reports import render_template, write_file
from eval.scatter import DISK, LATENCY, MEMORY, scatter, scatter_png

MARK = "comparison.json"


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write all forms of the comparison into the folder; returns the path of comparison.html.

    Raises:
        ConfigError: the folder holds something else than an earlier comparison; nothing in it is touched.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file()):
        what = "exists and is no comparison"
        raise ConfigError(Problem(str(folder), what, "choose another --output; nothing in it was touched"))
    folder.mkdir(parents=True, exist_ok=True)
    values = comparison.values()
    content = {"reference": comparison.reference, "rows": values, "tests": [vars(test) for test in comparison.tests]}
    write_file(folder / MARK, json.dumps(content, indent=1) + "\n")
    table = pandas.DataFrame(values)
    write_file(folder / "comparison.csv", table.to_csv(index=False))
    latex = table.drop(columns=["run", "stage"]).to_latex(index=False, float_format="%.4g", na_rep="--", escape=True)
    write_file(folder / "comparison.tex", latex)
    names = [entry.name for entry in comparison.entries]
    stages = [entry.stage for entry in comparison.entries]
    plots = []
    for cost in (MEMORY, LATENCY, DISK):
        plot, picture = scatter(names, stages, cost, front=True), scatter_png(names, stages, cost, front=True)
        if plot is not None and picture is not None:
            plots.append(plot)
            write_file(folder / f"{cost.name}.png", picture)
    for name, escape in (("comparison.md", False), ("comparison.html", True)):
        text = render_template("eval", f"{name}.j2", escape, view=comparison, plots=plots)
        write_file(folder / name, text)
    return folder / "comparison.html"

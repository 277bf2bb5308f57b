"""report.json and what is made of it: report.md and a self-contained report.html."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pydantic import ValidationError

from compress_peft.errors import CorruptFile, DataError, Problem
from eval.records import RunReport

__all__ = ["read_report", "render", "write_report"]


def write_report(report: RunReport, folder: str | Path) -> Path:
    """Writes report.json, report.md and report.html into the folder, each atomically; returns the last's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    return render(folder)


def read_report(folder: str | Path) -> RunReport:
    """The report of a run folder.

    Raises:
        DataError: there is none.
        CorruptFile: it is damaged, or of another schema version.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise DataError(Problem(str(path), "does not exist", "give the folder of a finished run"))
    try:
        return RunReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = f"is not a report of this version: {where}: {first['msg']} ({error.error_count()} errors)"
        raise CorruptFile(Problem(str(path), what, "repeat the run, or use the version that wrote it")) from error


def render(folder: str | Path) -> Path:
    """Makes report.md and report.html from report.json alone; returns the path of report.html."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from pipelines.report.plots import draw_all
    from pipelines.report.view import build_view

    folder = Path(folder)
    report = read_report(folder)
    view = build_view(report)
    loader = PackageLoader("pipelines.report", ".")
    for name, escape in (("report.md", False), ("report.html", True)):
        environment = Environment(
            loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        plots = draw_all(report) if escape else []
        _write(folder / name, environment.get_template(f"{name}.j2").render(view=view, report=report, plots=plots))
    return folder / "report.html"


def _write(path: Path, text: str) -> None:
    """Write beside the target and rename: a reader sees the old file or the new one, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

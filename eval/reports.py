"""Reading report.json, and writing pages that nobody sees half done."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress_peft.errors import CorruptFile, DataError, Problem
from eval.records import RunReport


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


def render_template(package: str, name: str, escape: bool, **values: Any) -> str:
    """The template of this name in `package`, which may include the files of `eval` (page.css)."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("eval", ".")])
    environment = Environment(
        loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values)


def write_file(path: Path, content: str | bytes) -> None:
    """Write beside the target and rename: a reader sees the old file or the new one, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

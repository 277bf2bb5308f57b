"""The run folder: created once, resumed on request, never overwritten silently.

recipe.yaml               the resolved recipe
steps/01-quantize/        result.json and what the step wrote (models, adapters, checkpoints)
stages/00-original.json   what was measured after each step
report.json, .md, .html   the report
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from compress_peft.errors import ConfigError, CorruptFile, Problem

RECIPE = "recipe.yaml"
LOCK = ".lock"


def open_folder(folder: Path, recipe: dict[str, Any], *, resume: bool, overwrite: bool) -> FileLock:
    """Create or continue the run folder and return the lock that the caller holds while it works.

    Raises:
        ConfigError: the folder is taken and neither resume nor overwrite is given, it is no run folder, its
            recipe is another one, or another process works in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(Problem(str(folder), "is a file", "choose another --output"))
    occupied = folder.is_dir() and any(folder.iterdir())
    ours = (folder / RECIPE).exists()
    if occupied and not ours:
        what = "exists and is no run folder"
        raise ConfigError(Problem(str(folder), what, "choose another --output; nothing in it was touched"))
    if occupied and not (resume or overwrite):
        fix = "--resume to go on where it stopped, --overwrite to start again, or another --output"
        raise ConfigError(Problem(str(folder), "holds an earlier run", fix))
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        what = "another process is working in it"
        raise ConfigError(Problem(str(folder), what, "wait for it, or choose another --output")) from error
    if ours and overwrite:
        for path in folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        ours = False
    if ours:
        try:
            _same_recipe(folder, recipe)
        except ConfigError:
            lock.release()
            raise
    else:
        (folder / RECIPE).write_text(_yaml(recipe), encoding="utf-8")
    return lock


@contextmanager
def start_folder(folder: Path, recipe: dict[str, Any]) -> Iterator[Path]:
    """A new run folder with this recipe, filled by the caller and put in place in one move; yields where to write."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (scratch / RECIPE).write_text(_yaml(recipe), encoding="utf-8")
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise


def _yaml(recipe: dict[str, Any]) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _same_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    try:
        stored = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        before, now = _flat(stored), _flat(recipe)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        what = f"cannot be read: {error}"
        raise CorruptFile(Problem(str(folder / RECIPE), what, "start again with --overwrite")) from error
    missing = object()
    problems = [
        Problem(key, f"was {before.get(key, 'not set')!r}, is {now.get(key, 'not set')!r}", "")
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
    ]
    if problems:
        fix = "resume with the recipe it was started with, start again with --overwrite, or choose another --output"
        head = Problem(str(folder), "was started with another recipe", fix)
        raise ConfigError([head, *problems])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    return {key: leaf for path, item in pairs for key, leaf in _flat(item, path).items()}


def clear_unfinished(step_folder: Path) -> None:
    """Remove what a killed step left behind, except the training checkpoints from which it goes on."""
    if not step_folder.is_dir():
        return
    for path in step_folder.iterdir():
        if path.name == "checkpoints":
            for scratch in path.glob(".step-*"):
                shutil.rmtree(scratch)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

"""The runs of a sweep: in an order that lets each take what earlier ones have computed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from compress_peft.errors import ConfigError, Problem, UserError
from eval.comparison import compare_runs, read_runs, run_labels
from eval.comparison_page import write_comparison
from pipelines.folder import RECIPE, start_folder
from pipelines.grid import Variant, shared_steps
from pipelines.runner import resolved, run_recipe


def borrow(variant: Variant, finished: Sequence[Variant]) -> str:
    """Link what an earlier run has computed already into the new run's folder; says what, or ""."""

    if variant.folder.exists():
        return ""
    lender = max(finished, key=lambda other: shared_steps(variant.recipe, other.recipe), default=None)
    count = -1 if lender is None else shared_steps(variant.recipe, lender.recipe)
    if lender is None or count < 0:
        return ""
    with start_folder(variant.folder, resolved(variant.recipe)) as scratch:
        for kind in ("steps", "stages"):
            for path in sorted((lender.folder / kind).iterdir()):
                if int(path.name[:2]) <= count:
                    _link(path, scratch / kind / path.name)
    steps = [step.label() for step in variant.recipe.steps[:count]]
    return f"{', '.join(['original', *steps])} from {lender.name}"


def _link(source: Path, target: Path) -> None:
    """The same files under another name: finished files are never changed in place. A copy where links cannot be."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class Outcome:
    """page: the comparison of the runs that are done, if any is. failed: run -> why."""

    page: Path | None
    failed: dict[str, str]


def run_sweep(variants: Sequence[Variant], folder: Path, *, resume: bool, overwrite: bool, workers: int) -> Outcome:
    """Run the variants, at most `workers` at a time, and compare them; a run that fails does not stop the others.

    A variant waits while a running one will leave more of it behind than the finished ones have.

    Raises:
        ConfigError: the folder is taken, and neither resume nor overwrite is given.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (resume or overwrite):
        fix = "--resume to go on where it stopped, --overwrite to start again, or another --output"
        raise ConfigError(Problem(str(folder), "holds an earlier sweep or something else", fix))
    for scratch in folder.glob(".*-*"):  # of a killed sweep
        shutil.rmtree(scratch)
    if overwrite:
        for variant in variants:
            _remove(variant)
    failed = _run_all(variants, workers)
    done = [variant.folder for variant in variants if variant.name not in failed]
    page = None
    if done:
        page = write_comparison(compare_runs(read_runs(done), run_labels(done)), folder / "comparison")
    return Outcome(page, failed)


def _run_all(variants: Sequence[Variant], workers: int) -> dict[str, str]:
    pending, finished, failed = list(variants), [], {}
    running: dict[Future[str], tuple[Variant, int]] = {}
    run = _run_here if workers == 1 else partial(_run_in_process, workers=workers)

    def common(variant: Variant, others: Sequence[Variant]) -> int:
        return max((shared_steps(variant.recipe, other.recipe) for other in others), default=-1)

    with ThreadPoolExecutor(workers) as pool:
        while pending or running:
            for variant in list(pending):
                busy = [other for other, _ in running.values()]
                free = set(range(workers)) - {place for _, place in running.values()}
                if not free or common(variant, busy) > common(variant, finished):
                    continue
                place = min(free)
                told = borrow(variant, finished)
                number = len(variants) - len(pending) + 1
                note = f" ({told})" if told else ""
                print(
                    f"[{time.strftime('%H:%M:%S')}] run {number} of {len(variants)}: {variant.name}{note}", flush=True
                )
                pending.remove(variant)
                running[pool.submit(run, variant, place)] = (variant, place)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                variant, _ = running.pop(future)
                message = future.result()
                if message:
                    failed[variant.name] = message
                else:
                    finished.append(variant)
    return failed


def _remove(variant: Variant) -> None:

    if (variant.folder / RECIPE).exists():
        shutil.rmtree(variant.folder)


def _command(variant: Variant) -> list[str]:
    return [str(variant.folder / "recipe.yaml"), "--output", str(variant.folder), "--resume"]


def _run_here(variant: Variant, place: int) -> str:

    try:
        command = ["python -m pipelines.run", *_command(variant)]
        run_recipe(variant.recipe, variant.folder, resume=True, overwrite=False, command=command)
    except UserError as error:
        return str(error)
    except Exception as error:  # the other runs are worth having all the same; the traceback is kept
        log = variant.folder / "sweep.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {error}, see {log}"
    return ""


def _run_in_process(variant: Variant, place: int, workers: int) -> str:
    """Its output goes to sweep.log in the run's folder."""

    if not variant.folder.exists():
        with start_folder(variant.folder, resolved(variant.recipe)):
            pass
    environment = dict(os.environ)
    if torch.cuda.device_count():
        environment["CUDA_VISIBLE_DEVICES"] = str(place % torch.cuda.device_count())
    else:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    log = variant.folder / "sweep.log"
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "pipelines.run", *_command(variant)]
        code = subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False).returncode
    return "" if code == 0 else f"exit code {code}, see {log}"

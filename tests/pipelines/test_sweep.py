"""A grid of runs: what they share is computed once, a killed sweep goes on, one page compares them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.comparison import shared_original
from pipelines.grid import expand, read_sweep
from pipelines.report import read_report
from pipelines.run import EXIT_DONE, EXIT_USER
from pipelines.sweep import main
from tests.pipelines.conftest import write_recipe

REPOSITORY = Path(__file__).parents[2]
SWEEPS = REPOSITORY / "configs" / "sweeps"
QUANTIZERS = {
    "nf4": {"steps.0": {"step": "quantize", "method": "nf4"}},
    "int8": {"steps.0": {"step": "quantize", "method": "rtn", "bits": 8, "group_size": 32}},
}
ADAPTERS = {
    "para": {"steps.1.adapter": {"method": "para", "r": 2}},
    "lora": {"steps.1.adapter": {"method": "lora", "r": 2}},
}


@pytest.fixture
def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without its last two steps, trained a little."""
    del recipe["steps"][2:]
    recipe["steps"][1]["training"] |= {"max_steps": 2, "eval_steps": 2}
    recipe["evaluate"]["perplexity"] = None
    return recipe


def write_sweep(folder: Path, base: dict[str, Any], grid: Any) -> Path:
    path = folder / "sweep.yaml"
    write_recipe(folder, base, "base.yaml")
    path.write_text(yaml.safe_dump({"base": "base.yaml", "grid": grid}, sort_keys=False))
    return path


@pytest.mark.process
def test_a_killed_sweep_computes_each_shared_step_once(small: dict[str, Any], tmp_path: Path) -> None:
    path = write_sweep(tmp_path, small, {"quantizer": QUANTIZERS, "adapter": ADAPTERS})
    out = tmp_path / "sweep"
    command = [sys.executable, "-m", "pipelines.sweep", str(path), "--output", str(out)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "nf4-para" / "steps" / "02-finetune").exists():
        assert process.poll() is None, "the sweep ended early"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    quantized = (out / "nf4-para" / "steps" / "01-quantize" / "result.json").stat()
    assert main([str(path), "--output", str(out)]) == EXIT_USER
    assert main([str(path), "--output", str(out), "--resume"]) == EXIT_DONE
    names = ["nf4-para", "nf4-lora", "int8-para", "int8-lora"]
    reports = {name: read_report(out / name) for name in names}

    def place(name: str, part: str) -> int:
        return (out / name / part).stat().st_ino

    step, stage = "steps/01-quantize/result.json", "stages/00-original.json"
    assert place("nf4-para", step) == quantized.st_ino == place("nf4-lora", step)
    assert place("int8-para", step) == place("int8-lora", step) != quantized.st_ino
    assert len({place(name, stage) for name in names}) == 1
    assert [s.resumed for s in reports["nf4-lora"].steps] == [True, False]
    assert [s.resumed for s in reports["int8-para"].steps] == [False, False]
    tuned = {name: report.stages[-1].storage.adapter_parameters for name, report in reports.items()}
    assert tuned["nf4-para"] == tuned["int8-para"] != tuned["nf4-lora"]
    assert not list(out.glob(".*"))
    page = (out / "comparison" / "comparison.md").read_text()
    assert all(f"| {name} |" in page for name in ["original", *names])
    assert "steps.1.adapter.method" in page


@pytest.mark.long
def test_a_shared_run_equals_one_of_its_own(small: dict[str, Any], tmp_path: Path) -> None:
    path = write_sweep(tmp_path, small, {"steps.1.adapter.r": [2, 4]})
    assert main([str(path), "--output", str(tmp_path / "both")]) == EXIT_DONE
    alone = ["--grid", "steps.1.adapter.r=4", "--output", str(tmp_path / "alone")]
    assert main([str(tmp_path / "base.yaml"), *alone]) == EXIT_DONE
    shared, own = (read_report(tmp_path / folder / "r_4") for folder in ("both", "alone"))
    assert shared.steps[0].resumed and not own.steps[0].resumed
    assert [s.accuracies for s in shared.stages] == [s.accuracies for s in own.stages]
    assert shared.curves == own.curves
    assert shared_original([shared, own]) is not None


def test_a_failing_run_does_not_stop_the_others(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, small, {"steps.1.training.learning_rate": [1e30, 0.01]})
    assert main([str(path), "--output", str(tmp_path / "out")]) == EXIT_USER
    told = capsys.readouterr().err
    assert "failed: learning_rate_1e_30" in told and " became " in told
    page = (tmp_path / "out" / "comparison" / "comparison.md").read_text()
    assert "| learning_rate_0.01 |" in page and "1e_30" not in page


def test_all_problems_of_a_grid_are_told_before_anything_runs(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"adapter": {"good": ADAPTERS["lora"], "bad": {"steps.1.adapter": {"method": "lorra"}}}, "sede": [1, 2]}
    path = write_sweep(tmp_path, small, grid)
    assert main([str(path), "--output", str(tmp_path / "out")]) == EXIT_USER
    told = capsys.readouterr().err
    assert "lorra" in told and "sede" in told and not (tmp_path / "out").exists()
    assert "(2 problems)" in told  # not once for each of the four runs
    path.write_text(yaml.safe_dump({"base": "base.yaml", "grid": {"seed": 3}, "grids": 1}))
    assert main([str(path)]) == EXIT_USER
    told = capsys.readouterr().err
    assert "grid.seed" in told and "grids" in told


def test_dry_run_tells_what_is_shared(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, small, {"quantizer": QUANTIZERS, "adapter": ADAPTERS})
    assert main([str(path), "--dry-run", "--output", str(tmp_path / "out")]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 runs"
    assert [("(quantized" in line) for line in lines[1:5]] == [False, True, False, True]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_workers_share_too(small: dict[str, Any], tmp_path: Path) -> None:
    path = write_sweep(tmp_path, small, {"quantizer": QUANTIZERS, "adapter": ADAPTERS})
    assert main([str(path), "--output", str(tmp_path / "out"), "--workers", "2"]) == EXIT_DONE
    reports = [read_report(folder) for folder in sorted((tmp_path / "out").glob("*-*"))]
    assert sorted(report.steps[0].resumed for report in reports) == [False, False, True, True]


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_the_project_are_valid(path: Path, tmp_path: Path) -> None:
    base, axes, name = read_sweep(path, [])
    variants = expand(base, axes, [], tmp_path)
    assert name == path.stem and len(variants) == math.prod(len(options) for options in axes.values()) > 1

"""A recipe under torchrun: processes share the steps that can be shared, and the first does the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress_peft.models.shards import read_folder
from compress_peft.pruning import PRUNERS
from compress_peft.pruning.structured import SHRINKERS
from compress_peft.quantization import QUANTIZERS
from pipelines.report import read_report
from pipelines.run import EXIT_DONE, main
from pipelines.steps.prune import Prune
from pipelines.steps.quantize import Quantize
from tests.pipelines.conftest import write_recipe

NEEDED = {"mixed": {"budget": "4.5 bits"}}
CALIBRATION = {"samples": 5, "length": 32}  # not the same number for both


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command += ["-m", "pipelines.run", *words]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=280)


def without_tuning(recipe: dict[str, Any], **quantize: Any) -> dict[str, Any]:
    recipe["steps"] = [
        {"step": "prune", "method": "shortgpt", "sparsity": 0.5, "calibration": CALIBRATION},  # not shared
        {"step": "prune", "method": "wanda", "sparsity": 0.5, "calibration": CALIBRATION},
        {"step": "quantize", "method": "gptq", "group_size": 32, "calibration": CALIBRATION} | quantize,
    ]
    recipe["model"]["config"]["num_hidden_layers"] = 4
    return recipe


@pytest.mark.process
@pytest.mark.parametrize("out_of_core", [False, True])
def test_two_processes_do_what_one_does(recipe: dict[str, Any], tmp_path: Path, out_of_core: bool) -> None:
    path = write_recipe(tmp_path, without_tuning(recipe, out_of_core=out_of_core))
    done = torchrun(str(path), "--output", str(tmp_path / "two"))
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stdout.count("report: ") == 1
    assert main([str(path), "--output", str(tmp_path / "one")]) == EXIT_DONE
    two, one = read_report(tmp_path / "two"), read_report(tmp_path / "one")
    assert [step.details.get("processes") for step in two.steps] == [None, 2, 2]
    for ours, want in zip(two.stages, one.stages, strict=True):
        assert ours.name == want.name
        assert ours.perplexity is not None and want.perplexity is not None
        assert ours.perplexity.value == pytest.approx(want.perplexity.value, rel=0.01)
    for index, name in ((0, "01-prune"), (1, "02-prune")):
        found, wanted = (read_folder(tmp_path / run / "steps" / name / "model") for run in ("two", "one"))
        for key, place in found.items():
            same = (place.read() == wanted[key].read()).float().mean()
            assert same == 1 if index == 0 else same > 0.99, key


def test_what_cannot_be_shared_is_left_to_one_process() -> None:
    """Whatever works on the inputs of a block as they are, and not on sums over them."""

    def quantize(name: str) -> Quantize:
        return Quantize.model_validate({"step": "quantize", "method": name} | NEEDED.get(name, {}))

    def prune(name: str) -> Prune:
        return Prune.model_validate({"step": "prune", "method": name})

    assert {name for name in QUANTIZERS if not quantize(name).shares_work()} == {"autoround"}
    unshared = {name for name in (*PRUNERS, *SHRINKERS) if not prune(name).shares_work()}
    assert unshared == {"wanda++", *SHRINKERS}


@pytest.mark.process
def test_training_says_how_to_go_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    path, out = write_recipe(tmp_path, recipe), tmp_path / "out"
    done = torchrun(str(path), "--output", str(out))
    assert done.returncode != EXIT_DONE
    assert "training uses one" in done.stderr and "start it without torchrun" in done.stderr
    assert "rank1" not in done.stderr  # the other process ends without a traceback
    assert main([str(path), "--output", str(out), "--resume"]) == EXIT_DONE
    assert [step.resumed for step in read_report(out).steps] == [True, False, False, False]


@pytest.mark.process
def test_a_dry_run_ends_in_all_processes(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, without_tuning(recipe))
    done = torchrun(str(path), "--dry-run")
    assert done.returncode == EXIT_DONE
    assert done.stdout.count("ready to run") == 1

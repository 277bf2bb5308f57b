"""The prune step in recipes: legal orders run to the end with their zeros, illegal ones are refused with the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress_peft.loading import load
from compress_peft.models.sparsity import layer_masks, pruning_pattern
from compress_peft.weights import CompressedWeight
from eval.records import RunReport
from pipelines.plan import ModelShape
from pipelines.run import EXIT_DONE, EXIT_USER, main
from pipelines.steps import check_order
from pipelines.steps.prune import Prune
from tests.conftest import build_tiny_llama
from tests.pipelines.conftest import write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"samples": 6, "length": 32}
PRUNE = {"step": "prune", "method": "sparsegpt", "pattern": "2:4", "calibration": SMALL}
JOINT = PRUNE | {"quantize": {"bits": 4, "group_size": 32}}
MORE = {"step": "prune", "method": "magnitude", "sparsity": 0.75}
GPTQ = {"step": "quantize", "method": "gptq", "group_size": 32, "calibration": SMALL}
NF4 = {"step": "quantize", "method": "nf4"}
ADAPT = {
    "step": "finetune",
    "adapter": {"method": "lora", "rank": 2},
    "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.02, "eval_steps": 2},
}
BUNDLE = {"step": "merge", "policy": "bundle"}
DENSE = {"step": "merge", "policy": "dense"}
SPARSE = {"step": "merge", "policy": "sparse"}
EXPORT = {"step": "export", "format": "folder"}

LEGAL: dict[str, list[dict[str, Any]]] = {
    "prune-quantize-adapt-merge": [PRUNE, GPTQ, ADAPT, BUNDLE, EXPORT],
    "joint-adapt-merge": [JOINT | {"out_of_core": True}, ADAPT, BUNDLE, EXPORT],
    "adapt-merge-prune-quantize": [ADAPT, DENSE, PRUNE, NF4, EXPORT],
    "prune-adapt-merge-quantize": [PRUNE, ADAPT, SPARSE, GPTQ, EXPORT],
    "gradually": [PRUNE, ADAPT, SPARSE, MORE, EXPORT],
}


def run(recipe: dict[str, Any], steps: list[dict[str, Any]], folder: Path, *options: str) -> int:
    recipe["steps"] = steps
    recipe["data"]["splits"] = {"train": 24, "validation": 4, "test": 4}
    recipe["evaluate"] = {"perplexity": {"blocks": 1, "block_size": 64}, "task": None, "profile": None}
    return main([str(write_recipe(folder, recipe)), "--output", str(folder / "out"), *options])


@pytest.mark.parametrize("order", LEGAL)
@pytest.mark.long
def test_legal_orders_run_and_keep_the_zeros(order: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    steps = LEGAL[order]
    assert run(recipe, steps, tmp_path) == EXIT_DONE
    report = RunReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    share, expected = [stage.storage.sparsity for stage in report.stages if stage.storage], None
    for step, found in zip(steps, share[1:], strict=True):
        if step["step"] == "prune":
            expected = step.get("sparsity", 0.5)
            assert found == pytest.approx(expected, abs=0.02) and found >= expected
        assert (found is None) == (expected is None)
        assert expected is None or found >= expected
    model, _ = load(tmp_path / "out" / "steps" / f"{len(steps):02d}-export" / "model")
    masks = layer_masks(model)
    assert len(masks) == 14
    if pruning_pattern(model) == "2:4":
        assert all((mask.view(-1, 4).sum(1) <= 2).all() for mask in masks.values())
    quantized = any("quantize" in step or step["step"] == "quantize" for step in steps)
    assert any(isinstance(p, CompressedWeight) for p in model.parameters()) == quantized


def test_the_smoke_recipe_is_planned_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "configs/smoke/sparsegpt_gptq_lora_bundle.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe["steps"][0]["pattern"] == 124  # what YAML makes of 2:4
    recipe["data"]["source"] = str(REPOSITORY / recipe["data"]["source"])
    recipe["steps"] = recipe["steps"][:1]
    recipe["evaluate"] = {"perplexity": None, "task": None, "profile": None}
    written = str(write_recipe(tmp_path, recipe))
    assert main([written, "--dry-run", "--output", str(tmp_path / "out")]) == EXIT_DONE
    plan = capsys.readouterr().out
    assert "pruned (sparsegpt 2:4)" in plan and "14 layers, about 36,864 weights become zero" in plan
    assert main([written, "--output", str(tmp_path / "out")]) == EXIT_DONE
    details = json.loads((tmp_path / "out" / "report.json").read_text())["steps"][0]["details"]
    assert details["sparsity"] == 0.5 and details["settings"]["pattern"] == "2:4"
    assert len(details["layers"]) == 14 and all(0 < layer["output_error"] < 1 for layer in details["layers"])
    assert details["calibration"]["source"] == "training split" and details["calibration"]["tokens"] == 16 * 64
    assert "50.0% of the weights of the pruned layers are zero" in (tmp_path / "out" / "report.md").read_text()


ILLEGAL: list[tuple[list[dict[str, Any]], str, str]] = [
    ([NF4, PRUNE], "steps[1]", "put prune before quantize"),
    ([JOINT, NF4], "steps[1]", "keep one quantize step"),
    ([JOINT, PRUNE], "steps[1]", "put prune before quantize"),
    ([ADAPT, PRUNE], "steps[1]", "put a merge step before it"),
    ([PRUNE, ADAPT, NF4], "steps[2]", "put a merge step before it"),
    ([ADAPT, BUNDLE, PRUNE], "steps[2]", "prune before finetune"),
    ([PRUNE, EXPORT, PRUNE], "steps[2]", "put export last"),
    ([PRUNE, DENSE], "steps[1]", "put a finetune step before it"),
]


@pytest.mark.parametrize("case", range(len(ILLEGAL)))
def test_illegal_orders_are_refused_with_the_fix(case: int) -> None:
    steps, where, fix = ILLEGAL[case]
    problems = check_order(steps)
    assert [problem.where for problem in problems] == [where] and fix in problems[0].fix


REFUSED: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "order": ([NF4, PRUNE], ["steps[1]", '"prune" cannot follow here', "put prune before quantize"]),
    "joint needs dense": (
        [JOINT, ADAPT | {"adapter": {"method": "lora", "init": "pissa"}}],
        ["steps[1].adapter", "the backbone is quantized before"],
    ),
    "joint then dense merge": ([JOINT, ADAPT, DENSE], ["steps[2].policy", "fills the zeros"]),
    "filling zeros": ([PRUNE, ADAPT, DENSE], ["steps[2].policy", "fills the zeros", 'use the policy "sparse"']),
    "pattern": ([PRUNE | {"pattern": "4:2"}], ["steps[0]", '"4:2" is not a pattern n:m']),
    "both": ([PRUNE | {"sparsity": 0.7}], ["a sparsity of 0.5, not 0.7: give one of them"]),
    "typo": ([{"step": "prune", "method": "wnda"}], ["steps[0].method", 'did you mean "wanda"?']),
    "share": ([MORE | {"sparsity": 50}], ["steps[0].sparsity", "less than 1"]),
    "no file": (
        [PRUNE | {"calibration": {"text": "nowhere.txt"}}, NF4],
        ["steps[0].calibration.text", "nowhere.txt"],
    ),
    "shape": ([PRUNE | {"pattern": "3:5"}], ["model.layers.0.self_attn.q_proj", "does not divide its 64 inputs"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_loading(
    case: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("pipelines.runner.resolve_source", lambda *_: pytest.fail("loaded"))
    steps, expected = REFUSED[case]
    assert run(recipe, steps, tmp_path) == EXIT_USER
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message


def test_no_data_is_needed_without_calibration(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert Prune.model_validate(MORE).requires_data() is None
    assert "calibrates on the training split" in str(Prune.model_validate(PRUNE).requires_data())
    assert Prune.model_validate(MORE | {"allocation": "owl"}).requires_data() is not None
    assert Prune.model_validate(PRUNE | {"calibration": {"text": "a.txt"}}).requires_data() is None


def test_estimates() -> None:
    with torch.device("meta"):
        model = build_tiny_llama()

    def estimate(raw: dict[str, Any]) -> Any:
        shape = ModelShape(model, torch.float32, 512)
        result = Prune.model_validate(raw).estimate(shape)
        return result.memory, result.disk, shape.weight_bytes()

    plain, wanda, sparsegpt = (
        estimate(raw) for raw in (MORE, PRUNE | {"method": "wanda"}, PRUNE | {"calibration": SMALL})
    )
    assert plain[1] == plain[2] == wanda[2] and plain[0] < wanda[0] < sparsegpt[0]
    chunk, more = (
        estimate(PRUNE | {"method": "wanda", "calibration": {"samples": count, "length": 32}}) for count in (64, 70)
    )
    assert more[0] - chunk[0] == 6 * 32 * 64 * 4  # beside one chunk in a block
    blocks = estimate(PRUNE | {"method": "wanda", "out_of_core": True})
    assert blocks[0] < wanda[0] and blocks[2] == wanda[2]
    weights = 73728  # of the 14 layers, at 4 bits and 24 bits a group of 32
    assert plain[2] - estimate(JOINT)[2] == weights * 4 - weights * (4 + 24 / 32) / 8

"""An encoder-decoder through a whole recipe, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

import compress_peft
from compress_peft.weights.compressed import CompressedWeight
from eval.records import RunReport
from pipelines.plan import make_plan
from pipelines.recipe import parse_recipe
from pipelines.run import EXIT_DONE, main
from tests.pipelines.conftest import write_recipe

T5 = {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 320}
MORE = {"dropout_rate": 0.0, "initializer_factor": 0.5}


@pytest.fixture
def t5_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["model"]["config"] = T5 | MORE
    recipe["steps"][1]["adapter"] = {"method": "lora", "r": 8}
    recipe["steps"][1]["training"]["max_steps"] = 16
    recipe["steps"][2] = {"step": "merge", "policy": "bundle", "also": ["dense"]}
    recipe["evaluate"]["perplexity"] = {}
    return recipe


def test_the_whole_chain(t5_recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, t5_recipe)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    stages = {stage.name: stage for stage in report.stages}
    original, quantized, tuned, dense, bundle, exported = stages.values()
    losses = [point.value for point in report.curves[0].points]
    assert losses[-1] < losses[0] - 0.5
    assert tuned.answer_loss.value < quantized.answer_loss.value - 0.5
    assert all(
        stage.perplexity is None and stage.accuracy.n == stage.answer_loss.examples == 24 for stage in stages.values()
    )
    assert exported.answer_loss == bundle.answer_loss == tuned.answer_loss
    assert dense.answer_loss.value == pytest.approx(tuned.answer_loss.value, rel=1e-5)
    assert quantized.storage.bits_per_weight < 4.5 and original.storage.bits_per_weight is None
    assert "Answer loss" in (out / "report.md").read_text()
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "decoder_input_ids": torch.tensor([[0, 9, 10]])}
    bundled, tokenizer = compress_peft.load(out / "steps" / "04-export" / "model")
    merged = AutoModelForSeq2SeqLM.from_pretrained(out / "steps" / "03-merge" / "dense")
    assert type(merged) is T5ForConditionalGeneration
    torch.testing.assert_close(merged(**tokens).logits, bundled(**tokens).logits, rtol=1e-4, atol=1e-4)
    compressed = AutoModelForSeq2SeqLM.from_pretrained(out / "steps" / "01-quantize" / "model")
    assert isinstance(compressed.decoder.block[1].layer[1].EncDecAttention.k.weight, CompressedWeight)
    prompt = tokenizer("number 1 is red and red it stays\nTopic:", return_tensors="pt")
    assert bundled.generate(**prompt, max_new_tokens=3, min_new_tokens=3).shape == (1, 4)


def test_generated_answers_are_scored(t5_recipe: dict[str, Any], tmp_path: Path) -> None:
    t5_recipe["steps"] = [{"step": "quantize", "method": "rtn", "bits": 4, "group_size": 32, "head_bits": 8}]
    t5_recipe["evaluate"] = {"profile": None, "task": {"metrics": ["exact_match"], "max_new_tokens": 4, "limit": 6}}
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, t5_recipe)), "--output", str(out)]) == EXIT_DONE
    last = json.loads((out / "report.json").read_text())["stages"][-1]
    assert last["accuracies"][0]["metric"] == "exact match" and last["accuracies"][0]["n"] == 6
    assert last["answer_loss"]["examples"] == 6 and last["storage"]["bits_per_weight"] < 6


def test_calibrated_steps(t5_recipe: dict[str, Any], tmp_path: Path) -> None:
    calibration = {"samples": 8, "length": 32}
    t5_recipe["steps"] = [
        {"step": "prune", "method": "wanda", "sparsity": 0.3, "calibration": calibration},
        {"step": "quantize", "method": "gptq", "group_size": 32, "calibration": calibration},
        t5_recipe["steps"][1],
        {"step": "merge", "policy": "requantize", "compensate": "gptq", "calibration": calibration},
    ]
    plan = make_plan(parse_recipe(t5_recipe), Path("x"))
    assert not plan.problems
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, t5_recipe)), "--output", str(out)]) == EXIT_DONE
    stages = json.loads((out / "report.json").read_text())["stages"]
    losses = [stage["answer_loss"]["value"] for stage in stages]
    assert losses[3] < losses[2] - 0.3 and losses[4] < losses[2] - 0.3
    model, _ = compress_peft.load(out / "steps" / "04-merge" / "model")
    assert isinstance(model.decoder.block[1].layer[1].EncDecAttention.k.weight, CompressedWeight)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([{"step": "quantize", "method": "gptq", "out_of_core": True}], "leave out_of_core out"),
        ([{"step": "prune", "method": "wanda", "sparsity": 0.5, "out_of_core": True}], "leave out_of_core out"),
        ([{"step": "prune", "method": "shortgpt", "sparsity": 0.5}], "cuts the blocks of one stack"),
        ([{"step": "distill", "teacher": "original", "adapter": "lora"}], "train with a finetune step"),
        ([{"step": "quantize", "method": "rtn"}, {"step": "export", "format": "gguf"}], "runs decoder-only models"),
        ([{"step": "quantize", "method": "rtn", "rotate": True}], "leave rotate out"),
        ([{"step": "finetune", "adapter": {"method": "para"}}], "made for decoder-only models"),
    ],
)
def test_steps_for_one_stack_are_refused(t5_recipe: dict[str, Any], steps: list[Any], told: str) -> None:
    t5_recipe["steps"] = steps
    plan = make_plan(parse_recipe(t5_recipe), Path("x"))
    assert any(told in f"{problem.what} {problem.fix}" for problem in plan.problems)
    t5_recipe["model"]["config"] = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4} | {
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 320,
    }
    assert not any(
        "encoder-decoder" in problem.what for problem in make_plan(parse_recipe(t5_recipe), Path("x")).problems
    )


def test_measures_of_running_text_are_refused(t5_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    text = {"text": str(tmp_path / "text.txt")}
    t5_recipe["evaluate"] |= {"perplexity": text, "fidelity": True, "lm_eval": {"tasks": ["hellaswag"]}}
    problems = make_plan(parse_recipe(t5_recipe), Path("x")).problems
    wanted = ["evaluate.perplexity.text", "evaluate.fidelity", "evaluate.lm_eval"]
    assert [problem.where for problem in problems] == wanted and all(problem.fix for problem in problems)

"""The quantize step with a method that needs calibration: where the text comes from, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from compress_peft.data.blocks import CalibrationSettings, calibration_blocks, text_blocks
from compress_peft.data.examples import Example
from compress_peft.errors import ConfigError, DataError
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.quantization import QUANTIZERS
from eval.records import RunReport
from pipelines.plan import ModelShape
from pipelines.run import EXIT_DONE, EXIT_USER, main
from pipelines.steps.quantize import Quantize
from tests.conftest import build_tiny_llama
from tests.pipelines.conftest import write_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
GPTQ = {"step": "quantize", "method": "gptq", "bits": 4, "group_size": 32, "symmetric": True, "act_order": "static"}
SMALL = {"samples": 6, "length": 32}


def step(**calibration: Any) -> Quantize:
    return Quantize.model_validate(GPTQ | {"calibration": SMALL | calibration})


def state(train: list[str], perplexity: str | None = "test") -> Any:
    """What the step reads of a run; looking at validation or test would fail."""
    data = SimpleNamespace(train=tuple(Example("prompt", " response", text=text) for text in train))
    evaluate = SimpleNamespace(perplexity=perplexity and SimpleNamespace(text=perplexity))
    return SimpleNamespace(
        data=lambda: data, tokenizer=byte_tokenizer, recipe=SimpleNamespace(evaluate=evaluate), device="cpu"
    )


TRAIN = [f"document {i} says {'x' * i} and ends" for i in range(20)]


def test_the_smoke_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_PEFT_CACHE", str(tmp_path / "cache"))
    recipe = yaml.safe_load((REPOSITORY / "configs/smoke/gptq_para_bundle.yaml").read_text())
    recipe["data"]["source"] = str(REPOSITORY / recipe["data"]["source"])
    out = tmp_path / "out"
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(out)]) == EXIT_DONE
    report = RunReport.model_validate_json((out / "report.json").read_text())
    stages = {stage.name: stage for stage in report.stages}
    tuned, exported = stages["fine-tuned (para)"], stages["exported (folder), reloaded"]
    assert exported.perplexity is not None and tuned.perplexity is not None
    assert exported.perplexity.block_nll == tuned.perplexity.block_nll
    assert stages["quantized (gptq)"].storage.bits_per_weight == 4.5
    facts = report.steps[0].details
    calibration = recipe["steps"][0]["calibration"]
    assert facts["calibration"] == {
        "source": "training split",
        "documents": 48,
        "tokens": calibration["samples"] * calibration["length"],
        "sha256": facts["calibration"]["sha256"],
        **calibration,
    }
    assert len(facts["layers"]) == 14 and all(layer["output_error"] > 0 for layer in facts["layers"])


def test_calibration_is_text_of_the_training_split() -> None:
    blocks, facts = step()._calibration(state(TRAIN))
    assert blocks is not None and facts is not None and blocks.shape == (6, 32)
    text = byte_tokenizer().decode(blocks.flatten()).split("</s>")
    assert len(text) > 4 and all(part in TRAIN for part in text[1:-1])
    assert facts["sha256"] == hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    again, same = step()._calibration(state(TRAIN))
    _, different = step(seed=1)._calibration(state(TRAIN))
    assert torch.equal(blocks, again) and same == facts and different != facts


def test_calibration_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} " for i in range(400)))
    blocks, facts = step(text=str(path))._calibration(state([]))
    assert facts is not None and facts["source"] == str(path) and facts["samples"] == 6
    whole = text_blocks(byte_tokenizer(), [path.read_text()], 32).tolist()
    places = [whole.index(block) for block in blocks.tolist()]
    assert places == sorted(set(places)) and places != list(range(6))
    assert step(text=str(path)).requires_data() is None
    with pytest.raises(ConfigError, match="also the text that perplexity is measured on"):
        step(text=str(path))._calibration(state([], perplexity=f"{tmp_path}/../{tmp_path.name}/text.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        step(text=str(tmp_path))._calibration(state([]))


def test_too_little_text() -> None:
    with pytest.raises(DataError, match="6 blocks of 32 tokens are asked for, the text has 2"):
        calibration_blocks(byte_tokenizer(), ["a" * 32, "b" * 40], CalibrationSettings(samples=6, length=32))
    with pytest.raises(DataError, match="calibration: the text has 2 tokens, one block needs 32"):
        calibration_blocks(byte_tokenizer(), ["a"], CalibrationSettings(samples=6, length=32))


def test_a_method_without_statistics_needs_no_data() -> None:
    plain = Quantize.model_validate({"step": "quantize", "method": "nf4"})
    assert plain.requires_data() is None and plain._calibration(state([])) == (None, None)
    reason = step().requires_data()
    assert reason is not None and "gptq" in reason


def test_the_estimate_counts_hessians_and_activations() -> None:
    plain = Quantize.model_validate({"step": "quantize", "method": "rtn", "group_size": 32})

    def calibration_bytes(model: nn.Module, **calibration: Any) -> float:
        shapes = [ModelShape(model, torch.float32, 512) for _ in range(2)]
        return step(**calibration).estimate(shapes[0]).memory - plain.estimate(shapes[1]).memory

    with torch.device("meta"):
        model, wide_model = build_tiny_llama(), build_tiny_llama(intermediate_size=1024)
    short, long, wide = (
        calibration_bytes(given, samples=1000, length=length)
        for given, length in ((model, 32), (model, 256), (wide_model, 32))
    )
    assert long - short == 1000 * (256 - 32) * 64 * 4
    hessian = 4 * (1024**2 - 128**2)
    outputs = 4 * 2048 * 2 * (1024 - 128)  # of gate and up, in one pass
    assert wide - short == hessian + 3 * hessian + outputs
    problems = step(length=257).check(ModelShape(model, torch.float32, 512), "steps[0]")
    assert [problem.where for problem in problems] == ["steps[0].calibration.length"]
    unfit = Quantize.model_validate(GPTQ | {"group_size": 96})
    assert len(unfit.check(ModelShape(model, torch.float32, 512), "steps[0]")) == 15  # 14 layers, and 512 > 256


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "typo": ({"calibration": {"sampels": 4}}, ["steps[0].calibration.sampels", 'did you mean "samples"?']),
    "no file": ({"calibration": SMALL | {"text": "nowhere.txt"}}, ["steps[0].calibration.text", "nowhere.txt"]),
    "order": ({"act_order": "dynamic"}, ["steps[0].act_order", "static"]),
    "damping": ({"damping": -1}, ["steps[0].damping", "greater than 0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages(case: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = WRONG[case]
    recipe["steps"][0] = GPTQ | change
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "out")]) == EXIT_USER
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message


def test_no_data_section(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del recipe["data"], recipe["steps"][1:]
    recipe["steps"][0] = GPTQ
    recipe["evaluate"] = {"task": None, "perplexity": None, "profile": None}
    assert main([str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "out")]) == EXIT_USER
    message = capsys.readouterr().err
    assert "steps[0]: " in message and "calibrates on the training split" in message and "add data:" in message


def test_quantizers_with_statistics_have_calibration_settings() -> None:
    for name in QUANTIZERS:
        cls = QUANTIZERS[name]
        assert bool(cls.needs) == ("calibration" in cls.model_fields)

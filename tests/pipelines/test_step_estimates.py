"""The plan's figures for the steps: every large term is in them, in its exact size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress_peft.models.layers import decoder_layers, linear_layers
from compress_peft.models.needs import FACTOR_COPIES, LAYER_COPIES
from compress_peft.models.walk import chunk_tokens
from compress_peft.quantization.autoround import AutoRound
from pipelines.plan import ModelShape, StepEstimate
from pipelines.recipe import parse_recipe
from tests.conftest import build_tiny_llama

SMALL = {"samples": 6, "length": 32}
TOKENS = 6 * 32
LORA = {"method": "lora", "r": 4}
RTN = {"step": "quantize", "method": "rtn", "group_size": 32}
TUNED = [RTN, {"step": "finetune", "adapter": LORA}]
DATA = {
    "source": "configs/smoke/topics.jsonl",
    "prompt": "{text}\nTopic:",
    "response": " {label}",
    "max_length": 64,
    "splits": {"train": 48, "validation": 12, "test": 24},
}
LARGEST, BLOCK = 64 * 128, 3 * 64 * 64 + 3 * 64 * 128  # weights of a layer, and of the layers of a block
VOCABULARY = 128


def shape_of(dtype: torch.dtype = torch.float32, on_cpu: bool = True, **sizes: Any) -> ModelShape:
    with torch.device("meta"):
        return ModelShape(build_tiny_llama(**sizes), dtype, 64, on_cpu)


def estimates(
    steps: list[dict[str, Any]], shape: ModelShape | None = None, **data: Any
) -> tuple[StepEstimate, ModelShape]:
    """Of the last step, and the shape afterwards."""
    raw = {"model": {"source": "random", "config": {"model_type": "llama"}}, "data": DATA | data, "steps": steps}
    shape = shape or shape_of()
    shape.recipe = parse_recipe(raw)
    return [step.estimate(shape) for step in shape.recipe.steps][-1], shape


def memory(*steps: dict[str, Any], shape: ModelShape | None = None, **data: Any) -> float:
    return estimates(list(steps), shape, **data)[0].memory


def quantize(method: str, **settings: Any) -> dict[str, Any]:
    return {"step": "quantize", "method": method, "group_size": 32, "calibration": SMALL} | settings


def prune(method: str, **settings: Any) -> dict[str, Any]:
    return {"step": "prune", "method": method, "calibration": SMALL} | settings


def distill(**settings: Any) -> dict[str, Any]:
    training = {"batch_size": 4, "max_steps": 2}
    return {"step": "distill", "teacher": "original", "data": "text", "block_size": 32, "training": training} | settings


def test_the_sizes_are_those_of_the_model() -> None:
    layers = [layer.weight.numel() for _, layer in linear_layers(build_tiny_llama())]
    assert (max(layers), sum(layers)) == (LARGEST, len(decoder_layers(build_tiny_llama())) * BLOCK)


def test_codes_stand_beside_a_mapped_file_but_not_beside_converted_weights() -> None:
    mapped, shape = estimates([RTN])
    dense = shape.parameters * 4
    assert mapped.memory == dense + shape.compressed_bytes() + 4 * LAYER_COPIES * LARGEST
    assert memory(RTN, shape=shape_of(on_cpu=False)) == dense + 4 * LAYER_COPIES * LARGEST
    half = shape_of(torch.bfloat16)  # the file is in float32
    half.model.config.dtype = torch.float32
    converted = ModelShape(half.model, torch.bfloat16, 64)
    assert memory(RTN, shape=converted) == dense / 2 + 4 * LAYER_COPIES * LARGEST


@pytest.mark.parametrize("blocks", [False, True])
def test_calibration_counts_activations_hessians_and_their_inversion(blocks: bool) -> None:
    short = {"calibration": {"samples": 1, "length": 32}, "out_of_core": blocks}
    gptq = memory(quantize("gptq", **short))
    states, hessians, factors = 32 * 64 * 4, 4 * (6 * 64**2 + 128**2), FACTOR_COPIES * 4 * 128**2
    assert factors > 4 * 128**2 + 4 * LAYER_COPIES * LARGEST  # the work on a layer, which rtn does too
    assert gptq - memory(RTN | {"out_of_core": blocks}) == states + hessians + factors - 4 * LAYER_COPIES * LARGEST
    assert memory(quantize("gptaq", **short)) - gptq == states + hessians
    long = memory(quantize("gptq", calibration={"samples": 64, "length": 128}, out_of_core=blocks))
    passing = 4 * 2048 * (2 * 64 + 3 * 128 + 3 * 64)  # a chunk in a block, and the inputs that are looked at
    assert long - gptq == (64 * 128 - 32) * 64 * 4 + passing - factors


def test_a_block_that_is_trained_counts_what_is_trained_and_its_activations() -> None:
    autoround = memory(quantize("autoround"), shape=shape_of()) - memory(RTN)
    saved = (2 * 64 * 4 + 32 * 4 + 3 * 128) + 2 * 128 + 4 * 64 + 2 * 64
    assert autoround > 4 * 7 * BLOCK + 2 * TOKENS * 64 * 4 - 4 * LAYER_COPIES * LARGEST
    long = {"samples": 64, "length": 128}  # so that activations are more than the layers
    passed = 4 * chunk_tokens(AutoRound.needs) * saved
    assert memory(quantize("autoround", calibration=long)) > 4 * 7 * BLOCK + 2 * 64 * 128 * 64 * 4 + passed
    regional, plain = memory(prune("wanda++")), memory(prune("wanda"))
    assert regional - plain > 4 * 5 * BLOCK


def test_pruning_holds_a_block_and_its_masks_and_writes_over_the_weights() -> None:
    magnitude, shape = estimates([prune("magnitude")])
    assert magnitude.memory == shape.parameters * 4 + 4 * (LAYER_COPIES * LARGEST + 1.25 * BLOCK)
    joint, after = estimates([prune("sparsegpt", quantize={"bits": 4, "group_size": 32})])
    assert joint.memory == memory(prune("sparsegpt")) + after.compressed_bytes()


def test_structured_methods_leave_the_cut_weights_beside_the_file() -> None:
    cut = prune("flap", sparsity=0.3, multiple_of=8)
    found, shape = estimates([cut], shape_of(num_hidden_layers=40))
    dense = sum(p.numel() for p in build_tiny_llama(num_hidden_layers=40).parameters()) * 4
    assert shape.weight_bytes() < dense and found.memory > dense + 0.9 * (found.disk - 2 * 64 * VOCABULARY * 4)
    assert found.memory < dense + found.disk
    elsewhere = memory(cut, shape=shape_of(num_hidden_layers=40, on_cpu=False))
    assert elsewhere < dense + found.disk / 2
    gradients = memory(prune("llm_pruner", sparsity=0.3, multiple_of=8), shape=shape_of(num_hidden_layers=40))
    assert gradients > dense + 3 * 4 * 40 * BLOCK


def test_distillation_counts_the_teacher() -> None:
    (cached, shape), (live, _) = (estimates([distill(adapter=LORA, top_k=8, live=value)]) for value in (False, True))
    teacher = shape.parameters * 4
    logits = 4 * 4 * 33 * VOCABULARY
    assert teacher <= live.memory - cached.memory <= teacher + 2 * logits
    everything = memory(distill(adapter=LORA, live=True))
    assert 2 * logits <= everything - live.memory <= 4 * logits
    scored = memory(distill(adapter=LORA, score_batch_size=1000))  # the teacher alone, with many logits
    assert scored > teacher + 4 * 4 * 1000 * 33 * VOCABULARY
    full, _ = estimates([distill(adapter="full")])
    assert full.memory > 4 * teacher  # weights, two moments, the best weights
    assert not cached.at_most and estimates([distill(adapter=LORA, data="responses")])[0].at_most


def test_merging_counts_dense_copies_and_the_logits_that_are_compared() -> None:
    kinds = {kind: {"step": "merge", "policy": kind} for kind in ("bundle", "dense", "requantize")}
    bundle, shape = estimates([*TUNED, kinds["bundle"]])
    dense = shape.decompressed_bytes()
    assert dense == 2 * BLOCK * 4
    found = memory(*TUNED, kinds["dense"])
    assert found - bundle.memory == dense - 2 * shape.compressed_bytes()
    held = shape.weight_bytes() + 4 * shape.adapter_parameters
    logits = 4 * (2 * (512 + 64) + 6 * 64) * VOCABULARY
    passing = 4 * 64 * (2 * 64 + 3 * 128)
    assert found == held + shape.compressed_bytes() + dense + logits + passing
    assert memory(*TUNED, kinds["bundle"] | {"also": ["dense"]}) == max(bundle.memory, found)
    original = memory(*TUNED, kinds["dense"] | {"base": "original"})
    assert original - found == shape.parameters * 4
    assert bundle.at_most
    compensated = kinds["requantize"] | {"compensate": "gptq", "calibration": {"samples": 400, "length": 128}}
    assert memory(*TUNED, compensated) > held + 400 * 128 * 64 * 4


def test_an_export_is_read_back_and_one_without_a_loader_becomes_dense_twice() -> None:
    folder, shape = estimates([RTN, {"step": "export", "format": "folder"}])
    scratch = 4 * LARGEST
    assert folder.memory == 2 * shape.weight_bytes() + scratch
    file = shape.compressed_bytes() + (shape.weight_bytes() - shape.compressed_bytes()) / 2
    found = memory(RTN, {"step": "export", "format": "gguf"})
    assert found == shape.weight_bytes() + 2 * file + 2 * 4 * shape.parameters + scratch

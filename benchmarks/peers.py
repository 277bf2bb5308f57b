"""Other projects' quantizers and pruners on our calibration tokens, for the benchmarks of those names.

    "llm-compressor.gptq symmetric=true"    llmcompressor's GPTQModifier (bits, group_size, symmetric)
    "llm-compressor.awq"                    llmcompressor's AWQModifier
    "auto-round iters=200"                  auto_round's AutoRound
    "gptqmodel.gptq"                        gptqmodel's GPTQ, gptaq=true for its GPTAQ
    "llm-compressor.sparsegpt pattern=2:4"  llmcompressor's SparseGPTModifier (sparsity, pattern)
    "llm-compressor.wanda"                  llmcompressor's WandaPruningModifier

group_size null is one group a row. The model is left with weights that are rounded and dense, as its own project
evaluates them. They need packages that do not install beside the tested set with their dependencies; pip install
--no-deps in an environment of its own that sees this one's packages, and name its Python with --peer-python:
llmcompressor==0.14.0 compressed-tensors loguru auto-round==0.16.1 py-cpuinfo threadpoolctl, and for gptqmodel==7.7.0
(with --no-build-isolation and setuptools from 77 on) logbar tokenicer device-smi pypcre defuser torchao==0.18.0
protobuf ninja dill pillow.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress_peft import load
from compress_peft.models.save import save_model
from compress_peft.tensors.masks import parse_pattern

PEERS = ("llm-compressor.gptq", "llm-compressor.awq", "auto-round", "gptqmodel.gptq")
PRUNERS = ("llm-compressor.sparsegpt", "llm-compressor.wanda")


def quantize(name: str, model: nn.Module, tokenizer: Any, calibration: Tensor, settings: dict[str, Any]) -> nn.Module:
    """calibration: (samples, length) int64. Returns the model, whose weights are rounded."""
    settings = {"bits": 4, "group_size": 64, "symmetric": False} | settings
    if name == "auto-round":
        return _auto_round(model, tokenizer, calibration, settings)
    if name == "gptqmodel.gptq":
        return _gptqmodel(model, tokenizer, calibration, settings)
    return _llm_compressor(name.partition(".")[2], model, calibration, settings)


def prune(name: str, model: nn.Module, calibration: Tensor, settings: dict[str, Any]) -> nn.Module:
    """calibration: (samples, length) int64. Returns the model, some of whose weights are zero.

    Other settings than sparsity and pattern are the modifier's own.
    """
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    settings = {"sparsity": 0.5, "pattern": None} | settings
    if (given := settings.pop("pattern")) is not None:
        pattern = parse_pattern(given)
        gone = f"{pattern.m - pattern.n}:{pattern.m}"  # theirs says what goes, ours what stays
        settings |= {"sparsity": pattern.sparsity, "mask_structure": gone}
    modifier = SparseGPTModifier if name.endswith("sparsegpt") else WandaPruningModifier
    return _oneshot(model, [modifier(ignore=["re:.*lm_head"], **settings)], calibration)


def _llm_compressor(method: str, model: nn.Module, calibration: Tensor, settings: dict[str, Any]) -> nn.Module:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier

    size = settings.pop("group_size")
    weights = QuantizationArgs(
        num_bits=settings.pop("bits"),
        symmetric=settings.pop("symmetric"),
        strategy="channel" if size is None else "group",
        **({} if size is None else {"group_size": size}),
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    common = {"config_groups": groups, "ignore": ["lm_head"]}
    recipe = (
        [GPTQModifier(**common, **settings)]
        if method == "gptq"
        else [AWQModifier(**settings), QuantizationModifier(**common)]
    )
    return _oneshot(model, recipe, calibration)


def _oneshot(model: nn.Module, recipe: list[Any], calibration: Tensor) -> nn.Module:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():  # where nothing can be pinned their AWQ stops
        IntermediatesCache.pin_memory = lambda *_: None
    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
    )
    if torch.cuda.is_available():
        from compressed_tensors.offload import remove_dispatch

        remove_dispatch(model, onload_tensors=True)
    return model


def _gptqmodel(model: nn.Module, tokenizer: Any, calibration: Tensor, settings: dict[str, Any]) -> nn.Module:
    """Their codes, read by our loader. They take a folder and leave one."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # their own number for two cores is one, with which they stop
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    size = settings.pop("group_size")
    config = QuantizeConfig(
        bits=settings.pop("bits"),
        group_size=-1 if size is None else size,
        sym=settings.pop("symmetric"),
        gptaq=GPTAQConfig() if settings.pop("gptaq", False) else None,
        **settings,
    )
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "dense", Path(scratch) / "quantized"
        save_model(model, source, tokenizer)
        model.to("meta")  # so that theirs is the only one in memory
        theirs = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float32)
        theirs.quantize(rows, batch_size=1)
        theirs.save(str(target))
        return load(target, dtype=torch.float32)[0]


def _auto_round(model: nn.Module, tokenizer: Any, calibration: Tensor, settings: dict[str, Any]) -> nn.Module:
    from auto_round import AutoRound

    settings = {"amp": model.device.type != "cpu"} | settings  # amp=true for a CPU that multiplies bfloat16
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=settings.pop("bits"),
        group_size=-1 if (size := settings.pop("group_size")) is None else size,
        sym=settings.pop("symmetric"),
        dataset=rows,
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        batch_size=8,
        device_map=str(model.device),
        **settings,
    )
    quantized, _ = rounding.quantize()
    return quantized

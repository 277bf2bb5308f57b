"""Estimated against measured memory for ten configurations, each in a fresh process.

    python -m benchmarks.memory_model --model FOLDER [--json FILE] [--only NAME ...] [--work FOLDER]

Inference is measured by `python -m eval.profile` (load, prefill, decoding through the cache), training by a few steps
of this project's training loop on random tokens, all with MALLOC_MMAP_THRESHOLD_=1048576: so memory that is freed goes
back to the system. Without it (--heap) glibc's heap keeps holes between tensors that live long and short: on a LoRA
step of SmolLM2-135M 0.5 of 2.4 GB that no tensor takes (a step is a third faster then), after a prefill of 2 x 2040
tokens 0.15 of 1.5 GB. The compressed folders are written under --work (default: a temporary folder) by this process
first. Exit code 1 where an estimate is more than 15% away from what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from compress_peft import load
from compress_peft.adapters import ADAPTERS
from compress_peft.loading import choose_dtype
from compress_peft.models.save import save_model
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.quantization.head import quantize_head
from compress_peft.training import TrainingSettings, train
from eval.costs import MemoryEstimate
from eval.memory import estimate_inference, estimate_training, process_baseline
from eval.profile import Gauge, ProfileSettings, profile_folder
from pipelines.plan import ModelShape, meta_model
from pipelines.steps.quantize import Quantize

TOLERANCE = 0.15


@dataclass(frozen=True)
class Configuration:
    """quantizer: method and settings, None for dense. adapter: trained, None for inference."""

    name: str
    quantizer: dict[str, Any] | None = None
    head_bits: Any = None
    dtype: str = "float32"
    batch: int = 1
    prompt: int = 128
    new: int = 8
    adapter: dict[str, Any] | None = None
    checkpointing: bool = False


NF4: dict[str, Any] = {"method": "nf4"}
INT4: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 64}
INT8: dict[str, Any] = {"method": "rtn", "bits": 8, "group_size": 64}
LORA: dict[str, Any] = {"method": "lora", "r": 16}
CONFIGURATIONS = (
    Configuration("dense fp32"),
    Configuration("dense bf16", dtype="bfloat16"),
    Configuration("nf4", NF4),
    Configuration("int4 g64", INT4),
    Configuration("int8 g64", INT8),
    Configuration("int4 g64, head 8 bit", INT4, head_bits=8),
    Configuration("dense fp32, 2 x 2048 tokens cached", batch=2, prompt=2040),
    Configuration("nf4, lora training, 2 x 256", NF4, adapter=LORA, batch=2, prompt=256),
    Configuration("dense, lora training, 4 x 128", adapter=LORA, batch=4),
    Configuration("dense, lora training, 4 x 128, checkpointing", adapter=LORA, batch=4, checkpointing=True),
    Configuration("dense, full training, 1 x 128", adapter={"method": "full"}),
)


def prepare(source: str, configuration: Configuration, work: Path) -> Path:
    """The folder to load: the model's own, or a compressed one that is written once."""
    if configuration.quantizer is None:
        return Path(source)
    parts = [str(value) for value in configuration.quantizer.values()] + [f"head{configuration.head_bits}"]
    folder = work / "-".join(parts)
    if not folder.exists():
        model, tokenizer = load(source, dtype=torch.float32)
        settings = dict(configuration.quantizer)
        quantize_model(model, QUANTIZERS.create(settings.pop("method"), **settings), progress=False)
        if configuration.head_bits:
            quantize_head(model, configuration.head_bits)
        save_model(model, folder, tokenizer)
    return folder


def create_adapter(configuration: Configuration) -> Any:
    settings = dict(configuration.adapter or {})
    return ADAPTERS.create(settings.pop("method"), **settings)


def measure_training(folder: str, configuration: Configuration) -> dict[str, int]:
    """Peak resident set of this process while it trains; call it in a fresh one."""
    torch.manual_seed(0)
    process_baseline()
    gauge = Gauge(torch.device("cpu"))
    baseline = gauge.restart()
    model, tokenizer = load(folder, dtype=choose_dtype(configuration.dtype, torch.device("cpu")))
    adapter = create_adapter(configuration)
    model = adapter.attach(model)
    vocabulary, half = model.get_input_embeddings().weight.shape[0], configuration.prompt // 2
    pairs = [
        (torch.randint(vocabulary, (half,)).tolist(), torch.randint(vocabulary, (half,)).tolist())
        for _ in range(configuration.batch)
    ]
    gauge.restart()
    with tempfile.TemporaryDirectory() as checkpoints:
        train(
            model,
            tokenizer,
            pairs,
            pairs * 2,  # validation takes twice as many rows at once
            TrainingSettings(
                max_steps=2,  # the second has the optimizer's moments
                batch_size=configuration.batch,
                warmup=0,
                gradient_checkpointing=configuration.checkpointing,
            ),
            max_length=configuration.prompt,
            seed=0,
            checkpoints=Path(checkpoints),
            adapter=adapter,
        )
    return {"baseline": baseline, "run": gauge.peak()}


def measure(folder: Path, configuration: Configuration) -> dict[str, int]:
    if configuration.adapter is None:
        settings = ProfileSettings(
            device="cpu",
            dtype=configuration.dtype,
            prompt_tokens=configuration.prompt,
            new_tokens=configuration.new,
            batch=configuration.batch,
            repeats=1,
        )
        memory, _ = profile_folder(folder, settings)
        return {"baseline": memory.baseline_bytes, "load": memory.load_peak_bytes, "run": memory.run_peak_bytes}
    command = [sys.executable, "-m", "benchmarks.memory_model", "--model", str(folder), "--train", configuration.name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{configuration.name}: {done.stderr[-2000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def estimate(source: str, configuration: Configuration, baseline: int) -> MemoryEstimate:
    """From the configuration alone: nothing is loaded."""
    recipe = SimpleNamespace(
        model=SimpleNamespace(source=source, config=None, trust_remote_code=False), data=None, evaluate=None
    )
    model, _ = meta_model(recipe)
    assert model is not None
    stored = (model.config.dtype or torch.float32).itemsize * sum(p.numel() for p in model.parameters())
    dtype = choose_dtype(configuration.dtype, torch.device("cpu"))
    shape = ModelShape(model, dtype, configuration.prompt)
    if configuration.quantizer is not None:
        settings: dict[str, Any] = {"step": "quantize", "head_bits": configuration.head_bits, **configuration.quantizer}
        Quantize.model_validate(settings).estimate(shape)
    if configuration.adapter is None:
        return estimate_inference(
            model,
            shape.weight_bytes(),
            batch=configuration.batch,
            prompt=configuration.prompt,
            new=configuration.new,
            bytes_each=dtype.itemsize,
            compressed=configuration.quantizer is not None,
            stored=stored if model.config.dtype != dtype else None,
            baseline=baseline,
        )
    adapter = create_adapter(configuration)
    trainable = adapter.estimate_parameters(model)
    return estimate_training(
        model,
        shape.weight_bytes(),
        trainable,
        batch=configuration.batch,
        length=configuration.prompt,
        response=configuration.prompt // 2,
        bytes_each=dtype.itemsize,
        compressed=configuration.quantizer is not None,
        checkpointing=configuration.checkpointing,
        added=trainable < shape.parameters // 2,
        baseline=baseline,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a dense model")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the configurations to run")
    parser.add_argument("--work", help="folder for the compressed models, kept")
    parser.add_argument("--heap", action="store_true", help="with glibc's heap as it is")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    given = parser.parse_args()
    by_name = {configuration.name: configuration for configuration in CONFIGURATIONS}
    if given.train:
        print(json.dumps(measure_training(given.model, by_name[given.train])))
        return 0
    if not given.heap:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # of the processes that are measured
    baseline = process_baseline()
    rows = []
    print("| configuration | peak | estimate, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for configuration in CONFIGURATIONS:
            if given.only and not any(part in configuration.name for part in given.only):
                continue
            expected = estimate(given.model, configuration, baseline)
            folder = prepare(given.model, configuration, Path(given.work or scratch))
            measured = measure(folder, configuration)
            for kind, wanted in (("load", expected.load_peak_bytes), ("run", expected.peak_bytes)):
                if kind not in measured:
                    continue
                ratio = wanted / measured[kind]
                rows.append({"name": configuration.name, "peak": kind, "estimate": wanted, "measured": measured[kind]})
                print(
                    f"| {configuration.name} | {kind} | {wanted / 1e6:.0f} | {measured[kind] / 1e6:.0f} | {ratio:.3f} |"
                )
                sys.stdout.flush()
    wrong = [row for row in rows if abs(row["estimate"] / row["measured"] - 1) > TOLERANCE]
    if given.json:
        Path(given.json).write_text(json.dumps({"baseline": baseline, "rows": rows}, indent=1))
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} within {TOLERANCE:.0%}; the process itself {baseline / 1e6:.0f} MB"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

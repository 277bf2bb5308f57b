"""Estimated against measured memory of the steps of a recipe, each in a fresh process.

    python -m benchmarks.memory_of_steps [--model FOLDER] [--only NAME ...] [--json FILE] [--work FOLDER]

The estimates are those of `python -m pipelines.run CONFIG --dry-run`, made without loading anything; measured is the
peak resident set while the step runs on the model that the run has just measured. "Beyond" leaves out the process
itself, Python with its libraries and a tokenizer. Without --model a random Llama of 26 million parameters with a
vocabulary of 8,192 is made, so that all of it takes minutes.

As in benchmarks/memory_model.py MALLOC_MMAP_THRESHOLD_=1048576 is set, so that what is measured is what tensors take;
with --heap glibc's heap is left as it is, and keeps holes of the size of passing tensors (up to 32 MB each).
Exit code 1 where an estimate is more than 15% away from what was measured; one that the plan calls "at most" may be
more above it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from compress_peft.models.random_model import build_random, byte_tokenizer
from compress_peft.models.sources import atomic_folder, resolve_source
from eval.memory import process_baseline
from eval.profile import Gauge
from pipelines.plan import ModelShape, StepEstimate, meta_model
from pipelines.recipe import parse_recipe
from pipelines.state import RunState, write_json
from pipelines.steps.base import StepResult

TOLERANCE = 0.15
RANDOM: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}
Steps = tuple[dict[str, Any], ...]
TEXT = {"samples": 16, "length": 256, "text": "README.md"}
TRAINING = {"max_steps": 2, "batch_size": 8, "eval_steps": 2, "warmup": 0}
LORA = {"method": "lora", "r": 16}
INT4 = {"step": "quantize", "method": "rtn", "bits": 4, "group_size": 64, "symmetric": True}
NF4 = {"step": "quantize", "method": "nf4"}
TUNED: Steps = (INT4, {"step": "finetune", "adapter": LORA, "training": TRAINING})


def _quantize(method: str, **settings: Any) -> dict[str, Any]:
    return {"step": "quantize", "method": method, "calibration": TEXT} | settings


def _prune(method: str, **settings: Any) -> dict[str, Any]:
    return {"step": "prune", "method": method, "sparsity": 0.5, "calibration": TEXT} | settings


def _distill(**settings: Any) -> dict[str, Any]:
    text = {"data": "text", "block_size": 128, "training": TRAINING | {"max_steps": 2}}
    return {"step": "distill", "teacher": "original"} | text | settings


CASES: dict[str, Steps] = {
    "quantize rtn": (INT4,),
    "quantize nf4": (NF4,),
    "quantize gptq": (_quantize("gptq"),),
    "quantize awq": (_quantize("awq"),),
    "quantize autoround": (_quantize("autoround", iters=3),),
    "quantize rtn, out of core": (INT4 | {"out_of_core": True},),
    "quantize nf4, out of core": (NF4 | {"out_of_core": True},),
    "quantize gptq, out of core": (_quantize("gptq", out_of_core=True),),
    "quantize awq, out of core": (_quantize("awq", out_of_core=True),),
    "quantize autoround, out of core": (_quantize("autoround", iters=3, out_of_core=True),),
    "prune magnitude": ({"step": "prune", "method": "magnitude", "sparsity": 0.5},),
    "prune wanda": (_prune("wanda"),),
    "prune wanda, out of core": (_prune("wanda", out_of_core=True),),
    "prune sparsegpt": (_prune("sparsegpt"),),
    "prune sparsegpt, out of core": (_prune("sparsegpt", out_of_core=True),),
    "prune flap": (_prune("flap", sparsity=0.25),),
    "prune minitron": (_prune("minitron", sparsity=0.25),),
    "finetune lora": TUNED,
    "distill lora on nf4, scores on disk": (NF4, _distill(adapter=LORA)),
    "distill lora on nf4, live": (NF4, _distill(adapter=LORA, live=True)),
    "distill full, scores on disk": (_distill(adapter="full"),),
    "merge bundle": (*TUNED, {"step": "merge", "policy": "bundle"}),
    "merge dense": (*TUNED, {"step": "merge", "policy": "dense"}),
    "merge requantize": (*TUNED, {"step": "merge", "policy": "requantize"}),
    "export folder": (INT4, {"step": "export", "format": "folder"}),
    "export gguf": (INT4, {"step": "export", "format": "gguf"}),
}


def random_folder(work: Path) -> Path:
    """A random model whose tokenizer has as many tokens as the model."""
    folder = work / "random"
    if not folder.exists():
        with atomic_folder(folder) as made:
            for file in build_random(RANDOM, 0).folder.iterdir():
                (made / file.name).symlink_to(file)
            tokenizer = byte_tokenizer()
            tokenizer.add_tokens([f"<{index}>" for index in range(len(tokenizer), RANDOM["vocab_size"])])
            for file in made.glob("tokenizer*"):
                file.unlink()
            tokenizer.save_pretrained(made)
    return folder


def recipe_of(source: str, steps: Steps) -> Any:
    data = {
        "source": "configs/smoke/topics.jsonl",
        "prompt": "{text}\nTopic:",
        "response": " {label}",
        "choices": "label",
        "max_length": 128,
        "splits": {"train": 48, "validation": 12, "test": 24},
    }
    raw = {"name": "memory", "device": "cpu", "model": {"source": source}, "data": data, "steps": list(steps)}
    return parse_recipe(raw | {"evaluate": {"profile": None}})


def estimate(recipe: Any) -> StepEstimate:
    """Of the last step, as the plan has it."""
    model, _ = meta_model(recipe)
    assert model is not None
    shape = ModelShape(model, torch.float32, recipe.data.max_length)
    shape.recipe = recipe
    found = [step.estimate(shape) for step in recipe.steps]
    return found[-1]


def run_last(recipe: Any, folder: Path) -> dict[str, Any]:
    """Run the last step on what the earlier ones left in `folder`; call it in a fresh process."""
    torch.manual_seed(0)
    state = RunState(recipe, folder, resolve_source(recipe.model.source, recipe.model.config, recipe.seed))
    *earlier, last = recipe.steps
    for index, step in enumerate(earlier):
        path = folder / "steps" / f"{index + 1:02d}-{step.step}" / "result.json"
        state.apply(StepResult.from_json(json.loads(path.read_text())))
    place = folder / "steps" / f"{len(recipe.steps):02d}-{last.step}"
    place.mkdir(parents=True)
    state.tokenizer()
    baseline = process_baseline()
    model: Any = state.model()[0]  # there since the run measured it, and every page of it touched
    with torch.no_grad():
        tokens = torch.arange(model.config.vocab_size).split(1024)
        for part in tokens:
            model.get_input_embeddings()(part)
        model(tokens[0][None, :16])
    del model
    if getattr(last, "out_of_core", False) is True:
        state.forget_model()
    gauge = Gauge(torch.device("cpu"))
    gauge.restart()
    result = last.run(state, place)
    peak = gauge.peak()
    write_json(place / "result.json", result.to_json())
    return {"baseline": baseline, "peak": peak, "method": gauge.method}


def measure(source: str, steps: Steps, work: Path, heap: bool) -> dict[str, Any]:
    """Of the last step; those before it are run too, each in a process of its own, unless another case did that."""
    folder = work / hashlib.sha256(json.dumps([source, steps, heap]).encode()).hexdigest()[:16]
    result = folder / "figures.json"
    if not result.exists():
        places = folder / "steps"
        shutil.rmtree(folder, ignore_errors=True)
        places.mkdir(parents=True)
        if steps[:-1]:
            measure(source, steps[:-1], work, heap)
            before = work / hashlib.sha256(json.dumps([source, steps[:-1], heap]).encode()).hexdigest()[:16]
            for place in (before / "steps").iterdir():
                (places / place.name).symlink_to(place)
        command = [sys.executable, "-m", "benchmarks.memory_of_steps", "--model", source, "--step", str(folder)]
        environment = os.environ | ({} if heap else {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
        done = subprocess.run(command, input=json.dumps(steps), capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{steps[-1]}: {done.stderr[-3000:]}")
        result.write_text(done.stdout.splitlines()[-1])
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a dense model")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of the cases to run")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--work", help="folder for what the steps leave, kept; what is measured there is not run again")
    parser.add_argument("--heap", action="store_true", help="with glibc's heap as it is")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(run_last(recipe_of(given.model, tuple(json.load(sys.stdin))), Path(given.step))))
        return 0
    rows = []
    print("| step | estimate, MB | measured, MB | ratio | ratio beyond the process |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(given.work or scratch).absolute()
        source = given.model or str(random_folder(work))
        for name, steps in CASES.items():
            if given.only and not any(part in name for part in given.only):
                continue
            planned = estimate(recipe_of(source, steps))
            expected = planned.memory
            measured = measure(source, steps, work, given.heap)
            base, peak = measured["baseline"], measured["peak"]
            whole, beyond = (expected + base) / peak, expected / (peak - base)
            held = abs(whole - 1) <= TOLERANCE or (planned.at_most and whole > 1)
            rows.append(
                {"name": name, "estimate": expected + base, "at_most": planned.at_most, "held": held, **measured}
            )
            bound = "at most " if planned.at_most else ""
            figures = f"{bound}{(expected + base) / 1e6:.0f} | {peak / 1e6:.0f} | {whole:.3f} | {beyond:.3f}"
            print(f"| {name} | {figures} |", flush=True)
    wrong = [row["name"] for row in rows if not row["held"]]
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1))
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} within {TOLERANCE:.0%}; not: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

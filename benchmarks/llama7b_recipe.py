"""A recipe for Llama-2-7B on random weights of its shapes and made-up questions: memory and time of each stage.

    python -m benchmarks.llama7b_recipe --work /tmp/llama7b [--config configs/llama2_7b_nf4_para.yaml] [--steps 8]
    python -m benchmarks.llama7b_recipe --work /tmp/small --small --device cpu

Needs neither the weights nor the hub; 16 GB of disk for the model, and as much again for what the steps write.
Training is cut to --steps optimizer steps, perplexity to 4 blocks, latency to 3 repeats; all else is the recipe's. What
it says of quality means nothing: the weights are random, and so are the answers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.llama7b_shapes import LLAMA_7B, SMALL, config_of, write_model
from pipelines.run import main as run_recipe

TEXT = "the of and to in that market game film minister code said year people first government new music world"


def write_questions(folder: Path, seed: int = 0) -> None:
    """Records as BoolQ's: a passage of about 100 words, a question, yes or no."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, words = random.Random(seed), TEXT.split()
    for split, count in (("train", 400), ("validation", 128)):
        rows = [
            {
                "passage": " ".join(draw.choices(words, k=draw.randint(60, 140))),
                "question": " ".join(draw.choices(words, k=8)),
                "answer": draw.choice(["yes", "no"]),
            }
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def cut(recipe: dict[str, Any], model: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    recipe |= {"device": arguments.device, "model": {"source": str(model)}}
    recipe["data"]["source"] = str(data)
    for step in recipe["steps"]:
        if "training" in step:
            step["training"] |= {"epochs": 1, "max_steps": arguments.steps, "eval_steps": arguments.steps}
    less: dict[str, dict[str, Any]] = {"perplexity": {"blocks": 4}, "profile": {"repeats": 3}}
    if arguments.small:
        recipe["data"]["max_length"] = 64
        less["perplexity"]["block_size"] = 128
    evaluate = recipe.setdefault("evaluate", {})
    for key, values in less.items():
        evaluate[key] = (evaluate.get(key) or {}) | values
    return recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, the data and the run")
    parser.add_argument("--config", type=Path, default=Path("configs/llama2_7b_nf4_para.yaml"))
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of training")
    parser.add_argument("--layers", type=int, default=LLAMA_7B["num_hidden_layers"], help="blocks")
    parser.add_argument("--small", action="store_true", help="narrow layers, for a rehearsal in seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.layers = min(arguments.layers, 2)
    size = SMALL["hidden_size"] if arguments.small else LLAMA_7B["hidden_size"]
    model = arguments.work / f"model-{size}-{arguments.layers}"
    if not model.exists():
        begin = time.monotonic()
        write_model(model, config_of(arguments), seed=0, device=arguments.device)
        print(f"wrote {model} in {time.monotonic() - begin:.0f} s", flush=True)
    write_questions(arguments.work / "questions")
    recipe = cut(yaml.safe_load(arguments.config.read_text()), model, arguments.work / "questions", arguments)
    path = arguments.work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run_recipe([str(path), "--output", str(arguments.work / "run"), "--overwrite"])


if __name__ == "__main__":
    sys.exit(main())

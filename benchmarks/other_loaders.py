"""Exported folders and files, read by the programs that they are for: do they hold, and compute, the same?

    python -m benchmarks.other_loaders --model FOLDER [--tokens 64] [--json FILE]
    python -m benchmarks.other_loaders --model FOLDER --methods minitron flap --tokens 32

Each row quantizes the model in FOLDER, or takes a fifth of its blocks away (flap, ...), exports it and loads the
result with a loader that is not ours: transformers (compressed-tensors, bitsandbytes), gptqmodel (GPTQ; its kernel in
plain torch computes in float16) and llama.cpp (GGUF, through llama-cpp-python). Loaders that are not installed are
listed as such. Printed: the largest difference of a weight and of a logit, over the largest there is, and how many
tokens of a greedy continuation are the same before the first that is not, with the logits of both candidates there. The
codes are rtn's or nf4's, which need no calibration; structured pruning is calibrated on 8 x 128 tokens of the text of
benchmarks/quantizers.py.

llama.cpp rounds activations to 8 bits where weights are codes. "decoded" is the same quantized model with its weights
written as float32, where it does not: its text shows whether the weights are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quantizers import articles, find_text
from compress_peft import load
from compress_peft.data.blocks import calibration_blocks
from compress_peft.export import EXPORTERS
from compress_peft.pruning.structured import SHRINKERS, shrink_model
from compress_peft.quantization import QUANTIZERS
from compress_peft.quantization.apply import quantize_model
from compress_peft.weights import CompressedWeight

ROWS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("rtn", {"group_size": 64, "symmetric": True}, "compressed-tensors", {}),
    ("rtn", {"group_size": 64}, "compressed-tensors", {}),
    ("nf4", {}, "bitsandbytes", {}),
    ("rtn", {"group_size": 64, "symmetric": True}, "gptq", {}),
    ("rtn", {"group_size": 64}, "gptq", {}),
    ("", {}, "gguf", {"dense": "f32"}),
    ("rtn", {"group_size": 64, "symmetric": True}, "gguf", {"dense": "f32"}),
    ("rtn", {"group_size": 64, "symmetric": True}, "gguf", {"dense": "f32", "decoded": True}),
    ("rtn", {"group_size": 32}, "gguf", {"dense": "f32", "requantize": True}),
    *((name, {"sparsity": 0.2}, "gguf", {"dense": "f32"}) for name in SHRINKERS),
]
METHODS = sorted({row[0] or "dense" for row in ROWS})
LOADERS = {
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "gguf": "llama_cpp",
}
TEXT = "Write a short story about a lighthouse keeper."


def relative(other: Tensor, ours: Tensor) -> float:
    return float((other.float() - ours.float()).abs().max() / ours.float().abs().max())


def in_torch(model: nn.Module, theirs: Any, weights: Any, ids: Tensor) -> dict[str, Any]:
    """weights: name -> the weight that the other program stands for, (out, in), or None."""
    found = {}

    def compare() -> None:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, CompressedWeight) and name not in found and (other := weights(name)) is not None:
                found[name] = relative(other, weight.dequantize(torch.float32))

    compare()  # before the forward pass, which rearranges the bytes of bitsandbytes
    logits = relative(theirs(ids).logits, model(ids).logits)
    compare()  # and after it: compressed-tensors decodes a layer when it is first used
    return {"layers": len(found), "weights": max(found.values()), "logits": logits}


def through_transformers(model: nn.Module, folder: Path, ids: Tensor) -> dict[str, Any]:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def weight(name: str) -> Tensor | None:
        found = getattr(theirs.get_submodule(name), "weight", None)
        if hasattr(found, "quant_state"):
            import bitsandbytes

            return bitsandbytes.functional.dequantize_4bit(found.data, found.quant_state)
        return found if found is not None and found.is_floating_point() else None

    return in_torch(model, theirs, weight, ids)


def through_gptqmodel(model: nn.Module, folder: Path, ids: Tensor) -> dict[str, Any]:
    from gptqmodel import BACKEND, GPTQModel

    theirs = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    return in_torch(model, theirs, lambda name: theirs.get_submodule(name).dequantize_weight().t(), ids)


def through_llama_cpp(model: nn.Module, folder: Path, ids: Tensor, tokens: int) -> dict[str, Any]:
    from llama_cpp import Llama

    theirs = Llama(str(next(folder.glob("*.gguf"))), n_ctx=1024, logits_all=True, verbose=False)
    ours = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0].tolist()
    theirs.eval(ours)  # the same text through both: rows of logits that can be compared
    scores = torch.tensor(theirs.scores[: len(ours)])
    logits = model(torch.tensor([ours])).logits[0].float()
    start, end = ids.shape[1] - 1, len(ours) - 1
    ends = model.generation_config.eos_token_id or []
    allowed = scores[start:end].clone()
    allowed[:, ends] = -torch.inf  # as in ours, which has to go on
    other = allowed.argmax(-1).tolist()
    wanted = ours[start + 1 :]
    same = next((i for i, (a, b) in enumerate(zip(other, wanted, strict=True)) if a != b), tokens)
    found: dict[str, Any] = {"logits": relative(scores, logits), "same_tokens": same, "tokens": tokens}
    if same < tokens:
        pair = [wanted[same], other[same]]
        found["at_first_difference"] = {
            "ours": logits[start + same, pair].tolist(),
            "theirs": scores[start + same, pair].tolist(),
        }
    theirs.close()
    return found


@torch.no_grad()
def measure(row: tuple[str, dict, str, dict], source: str, tokens: int) -> dict[str, Any]:
    method, settings, form, options = row
    options = dict(options)
    decoded = options.pop("decoded", False)
    name = f"{method or 'dense'} {settings or ''}".strip() + decoded * ", decoded"
    facts: dict[str, Any] = {"method": name, "format": form}
    if importlib.util.find_spec(LOADERS[form]) is None:
        return facts | {"outcome": f"{LOADERS[form]} is not installed"}
    model, tokenizer = load(source)
    model.eval()
    if method in list(SHRINKERS):
        pruner = SHRINKERS.create(method, calibration={"samples": 8, "length": 128}, **settings)
        texts = articles(find_text(None), held_out=False)
        facts["removed"] = shrink_model(
            model, pruner, calibration_blocks(tokenizer, texts, pruner.calibration)
        ).sparsity
    elif method:
        quantize_model(model, QUANTIZERS.create(method, **settings), progress=False)
    for module in model.modules() if decoded else ():
        if isinstance(weight := getattr(module, "weight", None), CompressedWeight):
            module.weight = nn.Parameter(weight.dequantize(torch.float32), requires_grad=False)
    chat = tokenizer.chat_template is not None
    text = (
        tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False, add_generation_prompt=True)
        if chat
        else TEXT
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        EXPORTERS.create(form, **options).export(model, AutoTokenizer.from_pretrained(source), folder)
        if form == "gguf":
            found = through_llama_cpp(model, folder, ids, tokens)
        elif form == "gptq":
            found = through_gptqmodel(model, folder, ids)
        else:
            found = through_transformers(model, folder, ids)
    return facts | {"outcome": "loaded", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--formats", nargs="+", choices=sorted(LOADERS), default=sorted(LOADERS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tokens", type=int, default=64, help="of the greedy continuation (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results = []
    rows = [row for row in ROWS if row[2] in arguments.formats and (row[0] or "dense") in arguments.methods]
    for row in tqdm(rows, desc="exports", unit="export"):
        results.append(measure(row, arguments.model, arguments.tokens))
        print(json.dumps(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

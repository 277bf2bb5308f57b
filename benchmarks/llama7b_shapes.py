"""A random model with the shapes of Llama-2-7B, quantized block by block: peak memory, time, and a kill in the middle.

    python benchmarks/llama7b_shapes.py --work /tmp/llama7b --methods nf4 rtn
    python benchmarks/llama7b_shapes.py --work /tmp/llama7b --methods gptq --layers 4 --kill-after-blocks 2

Writes the dense model once (bf16, 13.5 GB with all 32 blocks; kept for the next call until --delete), and quantizes
it in a process of its own, whose peak resident memory is what is reported. With --kill-after-blocks N a second process
takes over what the first had on disk after N - 1 blocks (a copy, so that nothing is worked out twice), is killed
(SIGKILL) once it has finished block N, and is started again; the result must have the same checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from compress_peft.errors import UserError
from compress_peft.models.random_model import byte_tokenizer
from compress_peft.models.shards import INDEX, write_shard
from compress_peft.quantization import QUANTIZERS, quantize_folder

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(arguments: argparse.Namespace) -> LlamaConfig:
    shapes = LLAMA_7B | {"num_hidden_layers": arguments.layers}
    if arguments.small:
        shapes |= SMALL | {"vocab_size": 320}
    return LlamaConfig(**shapes, dtype="bfloat16")


def write_model(folder: Path, config: LlamaConfig, seed: int, device: str = "cpu") -> None:
    """Every block a file, every weight normal with deviation 0.02; the tensors of the last file come in last.

    device: where the numbers are drawn, which on a GPU takes seconds instead of minutes; other numbers than the CPU's.
    """
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    hidden, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    outside = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    block: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
    block |= {f"mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (hidden, wide)}
    block |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    files = [outside] + [
        {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
        for number in range(config.num_hidden_layers)
    ]
    index: dict[str, str] = {}
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        generator = torch.Generator(device).manual_seed(seed * 1000 + number)

        def make(shape: tuple[int, ...], generator: torch.Generator = generator) -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=torch.bfloat16)
            return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()

        write_shard(
            scratch / file,
            {name: (torch.bfloat16, shape, lambda shape=shape: make(shape)) for name, shape in shapes.items()},
        )
        index |= dict.fromkeys(shapes, file)
    (scratch / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(scratch)
    byte_tokenizer().save_pretrained(scratch)
    scratch.rename(folder)


def quantize(arguments: argparse.Namespace) -> None:
    """In a process of its own: the result and one line of JSON."""
    quantizer = QUANTIZERS.create(arguments.methods[0])
    calibration = None
    if quantizer.needs:
        shape = (arguments.samples, arguments.length)
        calibration = torch.randint(3, 259, shape, generator=torch.Generator().manual_seed(1))
    finished = 0

    def count(_: str) -> None:
        nonlocal finished
        finished += 1
        if finished == arguments.copy_after_blocks:
            shutil.copytree(unfinished(arguments.target), unfinished(second(arguments.target)))
        if finished == arguments.kill_after_blocks:
            os.kill(os.getpid(), signal.SIGKILL)

    begin, start = time.monotonic(), peak_bytes()
    summary = quantize_folder(
        arguments.model,
        arguments.target,
        quantizer,
        calibration,
        dtype=DTYPES[arguments.dtype],
        tokenizer=byte_tokenizer(),
        on_block=count,
    )
    facts = {
        "seconds": round(time.monotonic() - begin, 1),
        "peak_gb": peak_bytes() / 1e9,
        "start_gb": start / 1e9,
        "bits_per_weight": summary.bits_per_weight,
        "relative_error": summary.relative_error,
    }
    print(json.dumps(facts))


def unfinished(target: Path) -> Path:
    """Where `quantize_folder` keeps what it has of the target."""
    return target.with_name(f".{target.name}.partial")


def second(target: Path) -> Path:
    return target.with_name(f"{target.name}-killed")


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def checksum(folder: Path) -> str:
    """Of the weights and their order."""
    manifest = json.loads((folder / "compress_peft.json").read_text())["files"]
    parts = [f"{name} {digest}" for name, digest in sorted(manifest.items()) if name.endswith(".safetensors")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def run(arguments: argparse.Namespace, model: Path, target: Path, method: str, **after: int) -> dict[str, Any] | None:
    """The facts that `quantize` prints; None if it was killed. after: of blocks, copy_after or kill_after."""
    command = [sys.executable, "-W", "ignore", __file__, "--methods", method]
    command += ["--model", str(model), "--target", str(target), "--dtype", arguments.dtype]
    command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
    command += [f"--{key.replace('_', '-')}-blocks={value}" for key, value in after.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if after.get("kill_after") and done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(done.returncode)
    return dict(json.loads(done.stdout.decode().strip().splitlines()[-1]))


def measure(arguments: argparse.Namespace, model: Path, method: str) -> bool:
    """Print what one method takes; whether a killed run ends with the same checksum."""
    target, kill = arguments.work / f"result-{method}", arguments.kill_after_blocks
    for folder in (target, second(target)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(unfinished(folder), ignore_errors=True)
    facts = run(arguments, model, target, method, copy_after=max(kill - 1, 0))
    assert facts is not None
    digest = checksum(target)
    print(f"{method}: " + ", ".join(f"{k} {v:.4g}" for k, v in facts.items()) + f", sha256 {digest[:16]}", flush=True)
    shutil.rmtree(target)
    if not kill:
        return True
    target = second(target)
    killed = run(arguments, model, target, method, kill_after=1)
    assert killed is None, "there were fewer blocks: it was not killed"
    facts = run(arguments, model, target, method)
    assert facts is not None
    same = checksum(target) == digest
    what = f"{method}: killed after {kill} blocks and resumed ({facts['seconds']} s, peak {facts['peak_gb']:.4g} GB)"
    print(f"{what}: {'the same checksum' if same else 'ANOTHER CHECKSUM'}", flush=True)
    shutil.rmtree(target)
    return same


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("llama7b"), help="folder for the models")
    parser.add_argument("--methods", nargs="+", default=["nf4", "rtn"], help="quantizers, with their default settings")
    parser.add_argument("--layers", type=int, default=32, help="blocks; the peak does not depend on it")
    parser.add_argument("--small", action="store_true", help="shapes for a rehearsal in seconds")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of activations and uncompressed weights")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences (random bytes)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--kill-after-blocks", type=int, default=0, metavar="N", help="kill a second run and resume it")
    parser.add_argument("--delete", action="store_true", help="delete the dense model at the end")
    parser.add_argument("--copy-after-blocks", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.target is not None:
        try:
            quantize(arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    config = config_of(arguments)
    model = arguments.work / f"dense-{'small' if arguments.small else '7b'}-{arguments.layers}"
    if not model.exists():
        arguments.work.mkdir(parents=True, exist_ok=True)
        inside = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        needed = 2 * (arguments.layers * inside + 2 * config.vocab_size * config.hidden_size) * 1.4
        free = shutil.disk_usage(arguments.work).free
        if free < needed:
            print(f"error: {needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free", file=sys.stderr)
            return 2
        begin = time.monotonic()
        write_model(model, config, seed=0)
        print(f"wrote {model} in {time.monotonic() - begin:.0f} s", flush=True)
    size = sum(file.stat().st_size for file in model.iterdir())
    print(f"{arguments.layers} blocks, {size / 1e9:.2f} GB in bf16, {torch.get_num_threads()} threads", flush=True)
    same = [measure(arguments, model, method) for method in arguments.methods]
    if arguments.delete:
        shutil.rmtree(model)
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())

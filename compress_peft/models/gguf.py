"""GGUF files become safetensors folders, once; the cache is keyed by the file's checksum."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import torch

from compress_peft.errors import ModelError, Problem
from compress_peft.models.sources import ResolvedModel, atomic_folder, cache_folder
from compress_peft.models.verify import sha256

CONVERTER_VERSION = 1  # raise it when the same file would convert to something else
FACTS = "gguf_source.json"


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of each GGUF type the file holds, e.g. {"Q4_1": 210, "F32": 61}."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(
            Problem(str(path), f"is not a readable GGUF file ({error})", "check or download the file again")
        ) from error
    return dict(collections.Counter(tensor.tensor_type.name for tensor in reader.tensors))


def cache_target(path: Path, digest: str) -> Path:
    """Where the converted file stands, or will stand."""
    return cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-v{CONVERTER_VERSION}"


def gguf_config(path: Path) -> Any:
    """The transformers configuration of the file, without converting it."""
    from transformers import AutoConfig

    target = cache_target(path, sha256(path))
    if (target / FACTS).exists():
        return AutoConfig.from_pretrained(target)
    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def convert_gguf(path: Path) -> ResolvedModel:
    """Dequantize a GGUF file to fp32 safetensors with its tokenizer and chat template.

    The first call takes as long as transformers needs (tens of seconds for 135M parameters), later calls
    only the checksum.

    Raises:
        ModelError: the file is damaged or its architecture is unknown to transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    digest = sha256(path)
    target = cache_target(path, digest)
    if not (target / FACTS).exists():
        types = tensor_types(path)
        logging.get_logger(__name__).info("converting %s once into %s", path, target)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                Problem(str(path), f"transformers cannot convert it: {error}", "use a Hugging Face folder instead")
            ) from error
        # transformers keeps the origin as a "quantization" and then refuses to save; the weights are dense now
        del model.config.quantization_config
        model.hf_quantizer = None
        facts = {"kind": "gguf", "file": path.name, "sha256": digest, "tensor_types": types}
        with atomic_folder(target, exist_ok=True) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / FACTS).write_text(json.dumps(facts, indent=2))
    facts = json.loads((target / FACTS).read_text())
    lossy = {name: n for name, n in facts["tensor_types"].items() if name not in {"F32", "F16", "BF16"}}
    notes: tuple[str, ...] = ()
    if lossy:
        kinds = ", ".join(f"{n} tensors of {name}" for name, n in sorted(lossy.items()))
        notes = (
            f"The source file {facts['file']} was quantized before ({kinds}); its dequantized weights are what "
            'this report calls "original", so losses are relative to that and not to the full-precision model.',
        )
    return ResolvedModel(target, facts, notes)

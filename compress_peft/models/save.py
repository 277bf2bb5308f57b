"""Write a model folder: complete and checked, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress_peft.errors import MissingRequirement, ModelError, Problem
from compress_peft.models.hf_quantizer import attach
from compress_peft.models.verify import write_manifest
from compress_peft.weights.storage import split_state_dict


def save_model(model: nn.Module, folder: str | Path, tokenizer: Any = None, max_shard_size: int | str = "5GB") -> Path:
    """Write config, weights (safetensors, compressed ones in parts), generation settings, tokenizer and manifest.

    The folder appears under its name only when everything in it is complete. Tied weights are stored once.
    max_shard_size: of one safetensors file, in bytes or as transformers writes it ("5GB").

    Raises:
        ModelError: the folder exists, or this is not a plain model of transformers (adapters are attached).
        MissingRequirement: not enough space on the disk.
    """
    folder = Path(folder)
    if folder.exists():
        raise ModelError(Problem(str(folder), "exists already and is not overwritten", "choose another folder"))
    if not isinstance(model, PreTrainedModel) or getattr(model, "peft_config", None):
        raise ModelError(
            Problem(type(model).__name__, "only a model without adapters can be saved", "merge or bundle it first")
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in split_state_dict(model)[0].values())
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        what = f"needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left"
        raise MissingRequirement(Problem(str(folder), what, "free some space or choose another disk"))
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        attach(model)
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_manifest(temporary, "model")
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder

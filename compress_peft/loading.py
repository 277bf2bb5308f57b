"""One call that loads every folder this project writes or reads: dense, compressed, adapted, bundled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

import compress_peft.adapters  # registers the tuners
import compress_peft.models.hf_quantizer  # noqa: F401  registers the quantizer
from compress_peft.errors import MissingRequirement, ModelError, Problem
from compress_peft.models.bundle import attach_saved, backbone_folder, is_bundle, load_adapter
from compress_peft.models.encoder_decoder import auto_class
from compress_peft.models.faster_generate import faster_generate
from compress_peft.models.foreign import load_foreign
from compress_peft.models.processes import local_rank
from compress_peft.models.sources import missing_source
from compress_peft.models.verify import MANIFEST, verify_folder
from compress_peft.weights.inference import use_kernels


def choose_device(wanted: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one. Of several processes that were started together, each has a GPU of its own,
    unless one is named.

    Raises:
        MissingRequirement: CUDA is asked for and not there, or there are fewer GPUs than processes.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise MissingRequirement(
            Problem("device", f'"{wanted}" is asked for, but torch finds no CUDA device', "use --set device=cpu")
        )
    rank = local_rank()
    if wanted != "cuda" or rank is None:
        return torch.device(wanted)
    if rank >= (found := torch.cuda.device_count()):
        what = f"process {rank + 1} on this machine has no GPU of its own: there are {found}"
        raise MissingRequirement(Problem("device", what, f"start {found} processes, or use --set device=cpu"))
    return torch.device("cuda", rank)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """ "auto" is what the processor does well: bfloat16 on CUDA (float16 before Ampere), float32 on CPUs."""
    if wanted != "auto":
        return dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model (evaluation mode) and tokenizer of a local folder.

    folder: a Hugging Face folder, a compressed folder of ours or in GPTQ, AWQ, compressed-tensors (pack-quantized) or
        bitsandbytes NF4 format, or a bundle (backbone and adapter together).
    dtype: of activations and of weights that are not compressed; "auto" chooses by device.
    verify: read every file that the folder's manifest lists and compare its checksum first.
    adapter: a folder of adapter weights to attach to the backbone; a bundle brings its own.

    Raises:
        ModelError: the folder is not a model, or a bundle is given a second adapter.
        CorruptFile: a file of the folder is damaged.
    """
    folder = Path(folder)
    problem = missing_source(str(folder)) if not is_bundle(folder) else None
    if problem is not None:
        raise ModelError(problem)
    if is_bundle(folder) and adapter is not None:
        raise ModelError(Problem(str(folder), "is a bundle and has an adapter already", "load it without adapter="))
    if verify and (folder / MANIFEST).exists():
        verify_folder(folder)
    device = torch.device(device)
    if isinstance(dtype, str):
        dtype = choose_dtype(dtype, device)
    backbone = backbone_folder(folder) if is_bundle(folder) else folder
    model = load_foreign(backbone, dtype, trust_remote_code)
    if model is None:
        config = AutoConfig.from_pretrained(backbone, trust_remote_code=trust_remote_code)
        model = auto_class(config).from_pretrained(
            backbone, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    # Before an adapter comes: its own layers stay as they are in training, so that what is loaded gives the same bits.
    use_kernels(model)
    faster_generate(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if is_bundle(folder):
        model = load_adapter(model, folder)
    elif adapter is not None:
        model = attach_saved(model, adapter)
    return model.to(device).eval(), tokenizer

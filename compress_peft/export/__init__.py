"""Export formats; importing this package registers them all."""

from compress_peft.export import awq, bitsandbytes, compressed_tensors, folder, gguf, gptq  # noqa: F401
from compress_peft.export.base import EXPORTERS, Exporter, verify_reloaded

__all__ = ["EXPORTERS", "Exporter", "verify_reloaded"]

"""Export formats; importing this package registers them all."""

from compress_peft.export import folder  # noqa: F401
from compress_peft.export.base import EXPORTERS, Exporter, verify_reloaded

__all__ = ["EXPORTERS", "Exporter", "verify_reloaded"]

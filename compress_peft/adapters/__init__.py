"""Adapters; importing this package registers all of them, and PARA with Hugging Face peft."""

from compress_peft.adapters.base import ADAPTERS, Adapter, ParameterCount, trainable_parameters
from compress_peft.adapters.ia3 import IA3
from compress_peft.adapters.lora import Lora
from compress_peft.adapters.para import Para

__all__ = ["ADAPTERS", "IA3", "Adapter", "Lora", "Para", "ParameterCount", "trainable_parameters"]

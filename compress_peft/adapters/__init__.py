"""Adapters; importing this package registers all of them, and our own tuners with Hugging Face peft."""

from compress_peft.adapters.base import ADAPTERS, Adapter, ParameterCount, trainable_parameters
from compress_peft.adapters.bitfit import BitFit
from compress_peft.adapters.boft import BOFT
from compress_peft.adapters.bottleneck import Compacter, Houlsby, Parallel, Pfeiffer
from compress_peft.adapters.fourierft import FourierFT
from compress_peft.adapters.generic import Peft
from compress_peft.adapters.ia3 import IA3
from compress_peft.adapters.ln_tuning import LNTuning
from compress_peft.adapters.loha import LoHa
from compress_peft.adapters.lokr import LoKr
from compress_peft.adapters.lora import Lora
from compress_peft.adapters.oft import OFT
from compress_peft.adapters.para import Para
from compress_peft.adapters.randlora import RandLora
from compress_peft.adapters.vera import Vera

__all__ = [
    "ADAPTERS",
    "BOFT",
    "IA3",
    "OFT",
    "Adapter",
    "BitFit",
    "Compacter",
    "FourierFT",
    "Houlsby",
    "LNTuning",
    "LoHa",
    "LoKr",
    "Lora",
    "Para",
    "Parallel",
    "ParameterCount",
    "Peft",
    "Pfeiffer",
    "RandLora",
    "Vera",
    "trainable_parameters",
]

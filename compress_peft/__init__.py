"""Compress, fine-tune, merge and measure language models; see the README.

Importing this package registers its quantizer with transformers and its tuners with peft, so that
`AutoModelForCausalLM.from_pretrained` and `PeftModel.from_pretrained` understand the folders it writes.
"""

from compress_peft.loading import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"

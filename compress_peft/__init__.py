"""Compress, fine-tune, merge and measure language models; see the README.

Importing this package registers its quantizer with transformers and its tuners with peft, so that
`AutoModelForCausalLM.from_pretrained` and `PeftModel.from_pretrained` understand the folders it writes.
"""

import logging

# Its hint at an optional download would come on every import, and is of no use here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from compress_peft.loading import load  # noqa: E402

__all__ = ["__version__", "load"]
__version__ = "0.1.0"

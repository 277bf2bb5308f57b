"""`python -m benchmarks.adapters [METHOD ...]`: adapters x backbones x lines of the adapters' contract, as Markdown.

Beside it stand the trainable parameters, what autograd keeps of a forward pass, and the time of a training step.
"""

import sys

import torch

from tests.adapters.contract import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])

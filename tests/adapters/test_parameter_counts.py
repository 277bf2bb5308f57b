"""Trainable parameters on the shapes of Llama-2-7B (no weights) against Table 2 of PARA's paper, in millions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress_peft.adapters.adalora import AdaLora
from compress_peft.adapters.lora import Lora

BLOCKS, HIDDEN, WIDE = 32, 4096, 11008
ENDS = 4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + WIDE)
"""in + out, summed over the seven linear layers of a block."""


@pytest.mark.parametrize(
    "adapter, expected",
    [
        # r (in + out) a layer: 32 * 4 * (4 * 8192 + 3 * 15104) = 9,994,240
        (Lora(r=4, target_modules="all-linear"), BLOCKS * 4 * ENDS),
        # and r singular values in each of 7 * 32 layers: 896 more. The budget of triplets at the end is target_r's.
        (AdaLora(init_r=4, target_r=2, target_modules="all-linear"), BLOCKS * 4 * (ENDS + 7)),
    ],
    ids=["LoRA", "AdaLoRA"],
)
def test_the_papers_ten_million(adapter, expected):
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=BLOCKS, num_attention_heads=32
        )
        model = LlamaForCausalLM(config)
        model = adapter.attach(model)
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert counted == expected
    assert round(counted / 1e6, 1) == 10.0

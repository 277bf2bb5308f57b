"""Names under which methods are known that are settings of another method here."""

from __future__ import annotations

WRITE_INSTEAD = {
    "qlora": "write a quantize step with method: nf4 before this step, and method: lora here",
    "dora": "write method: lora with use_dora: true",
    "rslora": "write method: lora with use_rslora: true",
    "lora+": "write method: lora with lr_ratio: 16",
    "loraplus": "write method: lora with lr_ratio: 16",
    "lora_plus": "write method: lora with lr_ratio: 16",
    "pissa": "write method: lora with init: pissa",
    "olora": "write method: lora with init: olora",
    "eva": "write method: lora with init: eva",
    "loftq": "write a quantize step before this step, and method: lora here with init: loftq and original: the folder "
    "of the model before it",
    "ir_qlora": "write a quantize step with method: nf4 before this step, and method: ir_lora here",
    "diffpruning": "write method: diff_pruning",
    "ltsft": "write method: lt_sft",
    "full_finetuning": "write method: full",
    "layernorm": "write method: ln_tuning",
    "intrinsic_said": "write method: said",
    "spot": "write method: prompt_tuning with init_from: the folder of a trained prompt",
    "p_tuning_v2": "write method: prefix_tuning with hidden: 0",
}
"""Name -> what to write."""

"""A small recipe on a random model and a file of examples, as a user would write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

TOPICS = {"red": "warm", "blue": "cold", "green": "calm"}


def write_examples(path: Path, start: int, count: int) -> Path:
    words = list(TOPICS)
    lines = [
        {"text": f"number {i} is {words[i % 3]} and {words[i % 3]} it stays", "label": TOPICS[words[i % 3]]}
        for i in range(start, start + count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe that runs through all steps in seconds; tests change it before they write it."""
    monkeypatch.setenv("COMPRESS_PEFT_CACHE", str(tmp_path / "cache"))
    examples = write_examples(tmp_path / "examples.jsonl", 0, 90)
    return {
        "name": "tiny",
        "device": "cpu",
        "model": {
            "source": "random",
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 320,
                "initializer_range": 0.1,
            },
        },
        "data": {
            "source": str(examples),
            "prompt": "{text}\nTopic:",
            "response": " {label}",
            "choices": "label",
            "max_length": 96,
            "splits": {"train": 48, "validation": 12, "test": 24},
        },
        "steps": [
            {"step": "quantize", "method": "nf4"},
            {
                "step": "finetune",
                "adapter": {"method": "para", "r": 4},
                "training": {
                    "max_steps": 12,
                    "batch_size": 8,
                    "learning_rate": 0.01,
                    "eval_steps": 4,
                    "patience": None,
                },
            },
            {"step": "merge", "policy": "bundle", "also": ["static"]},
            {"step": "export", "format": "folder"},
        ],
        "evaluate": {"perplexity": {"blocks": 2, "block_size": 64}, "profile": None},
    }


def write_recipe(folder: Path, recipe: dict[str, Any] | str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    return path

"""What a recipe refers to and this machine does not have, told without loading anything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from compress_peft.data.datasets import missing_data
from compress_peft.errors import Problem
from compress_peft.models.sources import missing_source
from eval.chat import missing_chat


def missing_inputs(model: Any, data: Any, evaluate: Any, device: str) -> list[Problem]:
    """Model, data, files and packages that are not at hand; sections that are None are left out."""
    missing = []
    if model is not None:
        missing.append(missing_source(model.source))
    if data is not None:
        missing += _missing_data(data, "data")
    for key in ("perplexity", "fidelity"):
        measured = getattr(evaluate, key, None)
        if measured is not None and measured.text != "test" and not Path(measured.text).expanduser().is_file():
            what = f'the file "{measured.text}" does not exist'
            missing.append(Problem(f"evaluate.{key}.text", what, 'give a text file, or "test"'))
    tasks = {"evaluate.task": evaluate.task} if evaluate is not None and evaluate.task is not None else {}
    for index, task in enumerate(evaluate.tasks if evaluate is not None else ()):
        tasks[f"evaluate.tasks[{index}]"] = task
        missing += _missing_data(task.data, f"evaluate.tasks[{index}].data")
    for key, task in tasks.items():
        if task.judge is not None:
            missing += missing_chat(task.judge, f"{key}.judge")
    harness = evaluate.lm_eval if evaluate is not None else None
    if harness is not None:
        if importlib.util.find_spec("lm_eval") is None:
            missing.append(Problem("evaluate.lm_eval", "lm-eval is not installed", 'pip install "compress-peft[eval]"'))
        if harness.include_path is not None and not Path(harness.include_path).expanduser().is_dir():
            what = f'the folder "{harness.include_path}" does not exist'
            missing.append(Problem("evaluate.lm_eval.include_path", what, "give a folder with task files"))
    if device.startswith("cuda") and importlib.util.find_spec("bitsandbytes") is None:
        missing.append(Problem("device", "CUDA kernels need bitsandbytes", 'pip install "compress-peft[cuda]"'))
    return [problem for problem in missing if problem is not None]


def _missing_data(data: Any, where: str) -> list[Problem]:
    found = [(key, missing_data(source)) for key, source in data.files().items()]
    return [Problem(where + key.removeprefix("data"), each.what, each.fix) for key, each in found if each is not None]

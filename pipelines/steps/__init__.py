"""The steps of a pipeline; importing this package registers them all."""

from pipelines.steps import distill, export, finetune, merge, prune, quantize  # noqa: F401
from pipelines.steps.base import STEPS, Alternative, Step, StepResult, check_order

__all__ = ["STEPS", "Alternative", "Step", "StepResult", "check_order"]

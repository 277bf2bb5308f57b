"""Settings of the training loop."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator


class TrainingSettings(BaseModel):
    """Optimization of the adapter; the defaults are those of the PARA paper (section 4.3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: PositiveFloat = 10
    """Passes over the training split; ignored if max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; default: epochs times the batches of the training split."""
    batch_size: PositiveInt = 16
    """Examples in one forward pass on one device."""
    gradient_accumulation: PositiveInt = 1
    """Batches summed into one optimizer step."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up."""
    warmup: float = Field(default=0.06, ge=0, lt=1)
    """Part of all steps in which the learning rate rises linearly from zero."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_steps: PositiveInt = 200
    """Steps between evaluations of the validation loss."""
    patience: PositiveInt | None = 10
    """Stop after so many evaluations without a lower validation loss; null never stops early."""
    checkpoint_steps: PositiveInt | None = None
    """Steps between checkpoints to resume from; default: eval_steps."""
    eos: bool = True
    """Train on the end-of-text token after the response, so that generation stops."""

    @model_validator(mode="after")
    def _warmup_leaves_steps(self) -> TrainingSettings:
        if self.max_steps is not None and self.warmup * self.max_steps > self.max_steps - 1:
            raise ValueError(f"warmup {self.warmup} leaves no step of {self.max_steps} at the peak learning rate")
        return self

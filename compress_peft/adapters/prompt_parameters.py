"""The numbers that a trained prompt consists of, and the networks that make it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Prompt(nn.Module):
    """P vectors of the width d, perhaps through a network; with `propagate` also P vectors for each later block.

    vocabulary: (V, d), the input embeddings. config: length P; start "random" (uniform in +-0.5), "vocabulary" (rows
    drawn from it) or "text" (the rows `tokens`, repeated or cut to P); encoder "", "mlp" or "lstm", of width `hidden`.
    """

    def __init__(self, vocabulary: Tensor, blocks: int, config: Any):
        super().__init__()
        length, width = config.length, vocabulary.shape[1]
        values = torch.rand(length, width, dtype=torch.float32) - 0.5
        if config.start != "random":
            rows = torch.randint(vocabulary.shape[0], (length,), device=vocabulary.device)
            if config.start == "text":
                repeated = (config.tokens * length)[:length]
                rows = torch.tensor(repeated, device=vocabulary.device)
            values = vocabulary.detach()[rows].float()
        self.embedding = nn.Parameter(values)
        self.lstm: nn.LSTM | None = None
        self.mlp: nn.Sequential | None = None
        hidden, inputs = config.hidden, width
        if config.encoder == "lstm":
            both = {"num_layers": 2, "bidirectional": True, "batch_first": True}
            self.lstm = nn.LSTM(width, hidden, dtype=torch.float32, **both)
            inputs = 2 * hidden
        if config.encoder:
            down, up = nn.Linear(inputs, hidden, dtype=torch.float32), nn.Linear(hidden, width, dtype=torch.float32)
            self.mlp = nn.Sequential(down, nn.ReLU(), up)
        more = torch.zeros(blocks - 1, length, width, dtype=torch.float32) if config.propagate else None
        self.later = None if more is None else nn.Parameter(more)

    def forward(self) -> Tensor:
        """(P, d) in float32."""
        values: Tensor = self.embedding
        with torch.autocast(values.device.type, enabled=False):
            if self.lstm is not None:
                values = self.lstm(values[None])[0][0]
            return values if self.mlp is None else self.mlp(values)

    def added(self, block: int) -> Tensor | None:
        """(P, d) to add to the prompt's hidden states before a block; None for nothing."""
        return None if self.later is None or block == 0 else self.later[block - 1]

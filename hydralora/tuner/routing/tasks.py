"""The weights of the experts by task, which are learned: one row of a table for each task.

Shape letters: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TaskTable(nn.Module):
    """The table of one layer; weight (tasks, E), whose softmax over the experts are the weights of a task.

    It is drawn from a normal distribution: if all tasks began with equal weights, and the experts with B = 0, the
    experts would stay the same for ever.

    Args:
        tasks: number of tasks.
        experts: E.
        even: start with zeros all the same, for experts that differ from the start.
    """

    def __init__(self, tasks: int, experts: int, even: bool = False) -> None:
        super().__init__()
        self.even = even
        self.weight = nn.Parameter(torch.empty(tasks, experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start of the weight."""
        nn.init.normal_(self.weight, std=0.0 if self.even else 1.0)

    def forward(self, tasks: Tensor, temperature: float = 1.0) -> Tensor:
        """Weights (..., E) float32 of the tasks (...) with these numbers."""
        logits = self.weight.float()
        # The whole table, so that every process uses all of it.
        return torch.softmax(logits / temperature if temperature != 1 else logits, dim=-1)[tasks]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"tasks={self.weight.shape[0]}, experts={self.weight.shape[1]}"

"""Expert utilization: the share of each expert and the entropy of the routing, over all and by task.

The numbers behind the paper's question whether experts specialise; logged while training and collected for analysis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydralora.layer import Routing


class RoutingStatistics:
    """Expert utilization: shares and entropy of the routing, over all blocks and valid tokens since the last `pop`."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (E + 2,): tokens per expert, entropy, tokens; float32 on the model's device

    @torch.no_grad()
    def add(self, routings: Sequence[Routing], attention_mask: Tensor | None) -> None:
        """Count one forward pass; arguments as of `expert_balance_loss`. Does not wait for the device."""
        for routing in routings:
            probabilities, choice = routing.probabilities, routing.choice
            valid = torch.ones_like(probabilities[..., :1])  # (B, L, 1)
            if attention_mask is not None:
                valid = attention_mask.to(valid).unsqueeze(-1)
            entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)  # (B, L, 1)
            counted = torch.cat([choice, entropy, torch.ones_like(valid)], dim=-1) * valid
            sums = counted.sum(dim=(0, 1))  # (E + 2,)
            self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def pop(self) -> dict[str, float]:
        """`share_<expert>` (they add up to 1) and `entropy` (nats; log E is uniform), then start again; {} if empty."""
        if self._sums is None:
            return {}
        *per_expert, entropy, tokens = self._sums.tolist()
        self._sums = None
        tokens = max(tokens, 1.0)
        return {f"share_{e}": count / tokens for e, count in enumerate(per_expert)} | {"entropy": entropy / tokens}


class TaskStatistics:
    """`RoutingStatistics` of everything and of each task."""

    def __init__(self) -> None:
        self._all = RoutingStatistics()
        self._by_task: dict[str, RoutingStatistics] = {}

    def add(
        self, routings: Sequence[Routing], attention_mask: Tensor | None, tasks: Sequence[str | int] | None = None
    ) -> None:
        """Count one forward pass. Does not wait for the device.

        Args:
            routings: of each layer, (B, L, E).
            attention_mask: (B, L), true at valid tokens; None: all are valid.
            tasks: the task of each row, -1 or empty for none; None: no row has one.
        """
        self._all.add(routings, attention_mask)
        for task in sorted({str(task) for task in tasks or () if task not in (-1, "")}):
            rows = [row for row, given in enumerate(tasks or ()) if str(given) == task]
            chosen = [Routing(routing.probabilities[rows], routing.choice[rows]) for routing in routings]
            mask = None if attention_mask is None else attention_mask[rows]
            self._by_task.setdefault(task, RoutingStatistics()).add(chosen, mask)

    def pop(self) -> dict[str, float]:
        """What `RoutingStatistics.pop` gives: `routing/<name>` for all, `routing/task_<task>/<name>` for a task."""
        values = {f"routing/{name}": value for name, value in self._all.pop().items()}
        for task, statistics in self._by_task.items():
            values |= {f"routing/task_{task}/{name}": value for name, value in statistics.pop().items()}
        return values

"""Expert utilization: the share of each expert and the entropy of the routing, over all and by task.

The numbers behind the paper's question whether experts specialise; logged while training and collected for analysis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydralora.layer import Routing, by_experts


class RoutingStatistics:
    """Expert utilization: shares and entropy of the routing, over all blocks and valid tokens since the last `pop`.

    Blocks with different numbers of experts are counted apart.
    """

    def __init__(self) -> None:
        # By E, (E + 2,): tokens per expert, entropy, tokens; float32 on the model's device.
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, routings: Sequence[Routing], attention_mask: Tensor | None) -> None:
        """Count one forward pass; arguments as of `expert_balance_loss`. Does not wait for the device."""
        for routing in (routing for group in by_experts(routings) for routing in group):
            probabilities, choice = routing.probabilities, routing.choice
            valid = torch.ones_like(probabilities[..., :1])  # (B, L, 1)
            if attention_mask is not None:
                valid = attention_mask.to(valid).unsqueeze(-1)
            entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)  # (B, L, 1)
            counted = torch.cat([choice, entropy, torch.ones_like(valid)], dim=-1) * valid
            sums = counted.sum(dim=(0, 1))  # (E + 2,)
            before = self._sums.get(probabilities.shape[-1])
            self._sums[probabilities.shape[-1]] = sums if before is None else before + sums.to(before.device)

    def pop(self) -> dict[str, float]:
        """`share_<expert>` (they add up to 1) and `entropy` (nats; log E is uniform), then start again; {} if empty.

        Where blocks have different numbers of experts the names are `share_<expert>_of_<E>` and `entropy_of_<E>`.
        """
        found: dict[str, float] = {}
        for experts, sums in sorted(self._sums.items()):
            *per_expert, entropy, tokens = sums.tolist()
            tokens, ending = max(tokens, 1.0), f"_of_{experts}" if len(self._sums) > 1 else ""
            found |= {f"share_{e}{ending}": count / tokens for e, count in enumerate(per_expert)}
            found[f"entropy{ending}"] = entropy / tokens
        self._sums = {}
        return found


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

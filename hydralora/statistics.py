"""Expert utilization: the share of each expert and the entropy of the routing, over all and by task.

The numbers behind the paper's question whether experts specialise; logged while training and collected for analysis.

Shape letters: B batch, L sequence length, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydralora.layer import Routing, by_experts, one_hot_argmax, stacked, stacked_choices

PENDING = 1 << 22
"""Probabilities that are kept until they are counted together, 16 MiB of float32."""


class _Pass(NamedTuple):
    """The routing of one forward pass.

    Attributes:
        probabilities: (layers, B, L, E) float32.
        choices: of the same shape, one-hot; None: the most probable expert of each token.
        mask: (B, L), true at valid tokens; None: all are valid.
        tasks: of each row, empty for none.
    """

    probabilities: Tensor
    choices: Tensor | None
    mask: Tensor | None
    tasks: Sequence[str]

    def by_row(self) -> Tensor:
        """(B, E + 2): tokens per expert, entropy and tokens of each row, over all layers; float32."""
        choices = one_hot_argmax(self.probabilities) if self.choices is None else self.choices
        entropy = torch.special.entr(self.probabilities).sum(dim=-1, keepdim=True)  # (layers, B, L, 1)
        counted = torch.cat([choices, entropy, torch.ones_like(entropy)], dim=-1).sum(dim=0)  # (B, L, E + 2)
        if self.mask is not None:
            counted = counted * self.mask.to(counted).unsqueeze(-1)
        return counted.sum(dim=1)


class _Counts:
    """Sums over forward passes, of everything and by task; what arrives is kept and counted in few operations.

    A pass costs one operation, whatever the number of layers, until `PENDING` numbers are there.
    """

    def __init__(self) -> None:
        self._pending: list[_Pass] = []
        self._kept = 0  # numbers in them
        # By task, "" for all, and E: as of `_Pass.by_row`, (E + 2,), on the device of the first layer.
        self._sums: dict[str, dict[int, Tensor]] = {}

    @torch.no_grad()
    def add(self, routings: Sequence[Routing], mask: Tensor | None, tasks: Sequence[str] = ()) -> None:
        """Keep one forward pass."""
        for group in _alike(routings):
            given = any(routing.given_choice is not None for routing in group)
            choices = stacked_choices(group) if given else None
            self._pending.append(_Pass(stacked([r.probabilities for r in group]), choices, mask, tasks))
            self._kept += self._pending[-1].probabilities.numel()
        if self._kept > PENDING:
            self._count()

    def _count(self) -> None:
        pending, self._pending, self._kept = self._pending, [], 0
        for each in pending:
            rows = each.by_row()
            self._add("", rows.sum(dim=0))
            for task in sorted(set(each.tasks) - {""}):
                chosen = [row for row, given in enumerate(each.tasks) if given == task]
                self._add(task, rows[chosen].sum(dim=0))

    def _add(self, task: str, sums: Tensor) -> None:
        by_number = self._sums.setdefault(task, {})
        experts = len(sums) - 2
        before = by_number.get(experts)
        by_number[experts] = sums if before is None else before + sums.to(before.device)

    @torch.no_grad()
    def pop(self) -> dict[str, dict[str, float]]:
        """For each task, "" for all, what `RoutingStatistics.pop` gives; then start again. Waits for the device."""
        self._count()
        sums, self._sums = self._sums, {}
        found: dict[str, dict[str, float]] = {}
        for task, by_number in sums.items():
            found[task] = {}
            for experts, values in sorted(by_number.items()):
                *per_expert, entropy, tokens = values.tolist()
                tokens, ending = max(tokens, 1.0), f"_of_{experts}" if len(by_number) > 1 else ""
                found[task] |= {f"share_{e}{ending}": count / tokens for e, count in enumerate(per_expert)}
                found[task][f"entropy{ending}"] = entropy / tokens
        return found


def _alike(routings: Sequence[Routing]) -> list[list[Routing]]:
    """The routings in groups of one shape; of different numbers of experts as of `by_experts`."""
    groups: dict[torch.Size, list[Routing]] = {}
    for routing in (routing for group in by_experts(routings) for routing in group):
        groups.setdefault(routing.probabilities.shape, []).append(routing)
    return list(groups.values())


class RoutingStatistics:
    """Expert utilization: shares and entropy of the routing, over all blocks and valid tokens since the last `pop`.

    Blocks with different numbers of experts are counted apart.
    """

    def __init__(self) -> None:
        self._counts = _Counts()

    def add(self, routings: Sequence[Routing], attention_mask: Tensor | None) -> None:
        """Count one forward pass; arguments as of `expert_balance_loss`. Does not wait for the device.

        The mask is kept for a while: it must not be changed afterwards.
        """
        self._counts.add(routings, attention_mask)

    def pop(self) -> dict[str, float]:
        """`share_<expert>` (they add up to 1) and `entropy` (nats; log E is uniform), then start again; {} if empty.

        Where blocks have different numbers of experts the names are `share_<expert>_of_<E>` and `entropy_of_<E>`.
        """
        return self._counts.pop().get("", {})


class TaskStatistics:
    """`RoutingStatistics` of everything and of each task."""

    def __init__(self) -> None:
        self._counts = _Counts()

    def add(
        self, routings: Sequence[Routing], attention_mask: Tensor | None, tasks: Sequence[str | int] | None = None
    ) -> None:
        """Count one forward pass. Does not wait for the device.

        Args:
            routings: of each layer, (B, L, E).
            attention_mask: (B, L), true at valid tokens; None: all are valid. It must not be changed afterwards.
            tasks: the task of each row, -1 or empty for none; None: no row has one.
        """
        named = ["" if task in (-1, "") else str(task) for task in tasks or ()]
        self._counts.add(routings, attention_mask, named)

    def pop(self) -> dict[str, float]:
        """What `RoutingStatistics.pop` gives: `routing/<name>` for all, `routing/task_<task>/<name>` for a task."""
        return {
            f"routing/{f'task_{task}/' if task else ''}{name}": value
            for task, values in self._counts.pop().items()
            for name, value in values.items()
        }

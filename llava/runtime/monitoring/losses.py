"""Mean losses on rows that are not trained on: of all of them and of groups of them, over all processes.

What a mean is over follows from how the run averages its training loss; a row without a target is left out of every
mean and counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.errors import BadSampleError

Reduction = Callable[[float, int, int], tuple[float, float]]
"""From the summed cross entropy of rows of one batch, their targets and their positions to a part of a mean: what is
added to the numerator, and to the denominator."""

NO_TARGET = "none of its tokens is trained on (its answers are cut off, or it has none)"


def over_targets(total: float, targets: int, positions: int) -> tuple[float, float]:
    """A mean over all target tokens."""
    return total, float(targets)


def over_batches(total: float, targets: int, positions: int) -> tuple[float, float]:
    """A mean of the means of the batches, each over its target tokens."""
    return (total / targets, 1.0) if targets else (0.0, 0.0)


def over_positions(total: float, targets: int, positions: int) -> tuple[float, float]:
    """The sum over target tokens, divided by all positions, padding included."""
    return total, float(positions)


class RowLosses(NamedTuple):
    """The losses of B rows.

    Attributes:
        totals: (B,) float32, summed cross entropy of the targets of each row.
        targets: (B,) int64, their number.
        positions: predicted positions of each row, padding included.
        others: further losses of the batch, scalars by name.
    """

    totals: Tensor
    targets: Tensor
    positions: int
    others: Mapping[str, Tensor]


def predicting_positions(labels: Tensor) -> Tensor:
    """The positions (n,) of which any row's prediction counts, of labels (B, L); the first one if none does."""
    places = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().flatten()
    return places if len(places) else places.new_zeros(1)


def row_losses(logits: Tensor, labels: Tensor, positions: Tensor | None = None) -> RowLosses:
    """The losses of rows.

    Args:
        logits: (B, L, V), any floating dtype; (B, n, V) beside `positions`.
        labels: (B, L), -100 where ignored.
        positions: (n,), where the logits are of these alone, see `predicting_positions`.
    """
    shifted = labels[:, 1:]  # (B, L - 1)
    kept = shifted if positions is None else shifted[:, positions]  # (B, n)
    each = nn.functional.cross_entropy(
        logits[:, : kept.shape[1]].float().flatten(0, 1), kept.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(kept.shape)  # (B, n)
    return of_totals(each.sum(1), labels)


def of_totals(totals: Tensor, labels: Tensor, others: Mapping[str, Tensor] | None = None) -> RowLosses:
    """The losses of rows whose sums (B,) are known, with labels (B, L) and further losses of the batch."""
    shifted = labels[:, 1:]  # (B, L - 1)
    return RowLosses(totals, (shifted != IGNORE_INDEX).sum(1), shifted.shape[1], others or {})


class Losses:
    """Parts of means, added up.

    Args:
        reduction: what a mean is over.

    Attributes:
        rows: number of rows that count.
        left_out: of the rows that do not, why, by the number of the row.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self.rows = 0
        self.left_out: dict[int, str] = {}
        self._parts: dict[str, tuple[float, float]] = {}  # by the name of a metric: numerator, denominator

    def add(
        self, rows: Sequence[int], found: RowLosses, groups: Sequence[Sequence[str]], reasons: Sequence[str | None]
    ) -> None:
        """Add a batch.

        Args:
            rows: numbers of its B rows.
            found: their losses.
            groups: of each row, the groups that it belongs to.
            reasons: of each row, why it is left out, or None.
        """
        totals, targets = found.totals.double().tolist(), found.targets.tolist()
        members: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            reason = reasons[place] or (None if targets[place] else NO_TARGET)
            if reason is not None:
                self.left_out[row] = reason
                continue
            self.rows += 1
            for name in ("loss", *(f"{group}_loss" for group in groups[place])):
                members[name].append(place)
        for name, places in members.items():
            total, count = sum(totals[place] for place in places), sum(targets[place] for place in places)
            self._add(name, self.reduction(total, count, found.positions * len(places)))
        if members:
            for name, value in found.others.items():
                self._add(f"{name}_loss", (value.item(), 1.0))

    def _add(self, name: str, part: tuple[float, float]) -> None:
        above, below = self._parts.get(name, (0.0, 0.0))
        self._parts[name] = (above + part[0], below + part[1])

    def merge(self, others: Iterable[Losses]) -> Losses:
        """All of `others`, which those of other processes are among, as one."""
        merged = Losses(self.reduction)
        for other in others:
            merged.rows += other.rows
            merged.left_out |= other.left_out
            for name, part in other._parts.items():
                merged._add(name, part)
        return merged

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>_loss`, `<prefix>_<group>_loss`, and how many rows count and do not.

        Raises:
            BadSampleError: none does.
        """
        if not self.rows:
            row, reason = min(self.left_out.items(), default=(0, "there are no rows"))
            raise BadSampleError(
                f"none of the {len(self.left_out)} rows to evaluate on has a loss; the first, row {row}: {reason}"
            )
        # The loss of everything first, then the groups in the order of their names.
        names = sorted(self._parts, key=lambda name: (name != "loss", name))
        means = {f"{prefix}_{name}": above / below for name in names for above, below in [self._parts[name]] if below}
        return means | {f"{prefix}_rows": self.rows, f"{prefix}_rows_left_out": len(self.left_out)}

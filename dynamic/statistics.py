"""What the predictors really keep, for the log.

Upstream logs the keep-rate losses of the last micro batch only; this counts every token since the last line of the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynamic.training import Decision


class KeepStatistics:
    """Counts judged and kept tokens of this process; nothing is copied from the device before `pop`."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, decisions: Mapping[str, Decision]) -> None:
        """Count one pass."""
        for name, decision in decisions.items():
            judged = decision.judged.to(torch.float32)
            counts = torch.stack([(decision.kept * judged).sum(), judged.sum()])
            self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def pop(self) -> dict[str, float]:
        """`kept_<predictor>`: the share of judged tokens that was kept, absent if none was judged; counts are reset."""
        counts = {name: pair.tolist() for name, pair in self._counts.items()}
        self._counts = {}
        return {f"kept_{name}": kept / judged for name, (kept, judged) in counts.items() if judged}

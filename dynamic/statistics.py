"""What the predictors really keep, and how sure they are, for the log.

Upstream logs the keep-rate losses of the last micro batch only; this counts every token since the last line of the log.

Shape letters: R spans, n longest span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynamic.layer import KEEP, hard_keep, top_keep_mask

if TYPE_CHECKING:
    from dynamic.training import Decision


class KeepStatistics:
    """Sums over the passes of this process; nothing is copied from the device before `pop`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, decisions: Mapping[str, Decision]) -> None:
        """Count one pass."""
        for name, decision in decisions.items():
            found = {f"kept_{name}": _share(decision.kept, decision.judged)}
            if decision.top_rate is not None:
                found |= _ranked(name, decision, decision.top_rate)
            for key, pair in found.items():
                self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def pop(self) -> dict[str, float]:
        """The means since the last call; what nothing was judged for is absent. The sums are reset.

        `kept_<predictor>` is the share of judged tokens that was kept. Of the predictor that inference asks for the
        best of each span, the image's: `keep_p10` and `keep_p90`, below which 10 % and 90 % of the keep probabilities
        of an image are, averaged over the images; `hard_image`, the share of tokens whose keep logit is the larger
        one; and `agree_image`, the share of tokens of which this says the same as the best of each image, both
        without noise.
        """
        sums = {name: pair.tolist() for name, pair in self._sums.items()}
        self._sums = {}
        return {name: total / count for name, (total, count) in sums.items() if count}


def _ranked(name: str, decision: Decision, keep_rate: float) -> dict[str, Tensor]:
    """The pairs (sum, count) of a predictor that ranks the tokens of a span."""
    judged, logits = decision.judged, decision.logits.float()
    hard = hard_keep(logits)  # (R, n)
    best = top_keep_mask(logits, keep_rate, judged)  # (R, n)
    probabilities = logits.softmax(dim=-1)[..., KEEP].masked_fill(~judged, torch.nan)  # (R, n)
    spans = judged.any(dim=-1)  # (R,)
    low, high = (probabilities.nanquantile(level, dim=-1).nan_to_num(0.0) for level in (0.1, 0.9))  # (R,) each
    return {
        f"hard_{name}": _share(hard, judged),
        f"agree_{name}": _share(hard == best, judged),
        "keep_p10": _share(low, spans),
        "keep_p90": _share(high, spans),
    }


def _share(values: Tensor, counted: Tensor) -> Tensor:
    """(2,): the sum of `values` where `counted`, and their number."""
    weights = counted.to(torch.float32)
    return torch.stack([(values.to(torch.float32) * weights).sum(), weights.sum()])

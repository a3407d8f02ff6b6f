"""What a rule decides about the tokens of one image: which ones stay, and what is merged into them.

Everything else, from packing to positions, cache and counts, is common code (`extension.py` of this folder).
Shape letters: n tokens that are judged, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Tokens of one image, or of the images of one row.

    Attributes:
        kept: int64 indices of the tokens that stay, each once; their order does not matter.
        merge: (len(kept), n) float32, what each of them becomes as weights of all tokens; None: nothing is merged.
    """

    kept: Tensor
    merge: Tensor | None = None

    def ascending(self) -> Selection:
        """The same with the kept tokens in the order of the sequence."""
        kept, order = self.kept.sort()
        return Selection(kept, None if self.merge is None else self.merge[order])

    def check(self, tokens: int, wanted: int, rule: str) -> None:
        """Refuse what a faulty rule returns.

        Raises:
            ValueError: another number of tokens than was asked for, one of them twice or out of range, or weights of
                another shape; names the rule and the numbers.
        """
        kept = self.kept
        if kept.ndim != 1 or kept.dtype != torch.long or len(kept) != wanted:
            raise ValueError(f"rule '{rule}': asked for {wanted} of {tokens} tokens, returned {tuple(kept.shape)}")
        if len(kept.unique()) != wanted or (wanted and not 0 <= int(kept.min()) <= int(kept.max()) < tokens):
            raise ValueError(f"rule '{rule}': the {wanted} indices are not different ones from 0 to {tokens - 1}")
        if self.merge is not None and self.merge.shape != (wanted, tokens):
            raise ValueError(
                f"rule '{rule}': weights of shape {tuple(self.merge.shape)}; {wanted} of {tokens} tokens need "
                f"({wanted}, {tokens})"
            )


def best(scores: Tensor, count: int) -> Tensor:
    """Indices (count,), ascending, of the highest of `scores` (n,); of equal ones the first."""
    return scores.float().sort(descending=True, stable=True).indices[:count].sort().values

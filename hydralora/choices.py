"""Constant weights of experts as a user chooses them; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Weights = str | int | Sequence[float] | Mapping[str, Sequence[float]] | None
"""Choice of constant weights: `uniform`; the number of one expert; a weight for each expert; or such by router.

None: there is one expert, or the adapter knows its weights itself.
"""

UNIFORM, MEAN = "uniform", "mean-routing"

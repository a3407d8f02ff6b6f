"""Expert utilization of single samples while a model generates, counted pass by pass.

Shape letters: B batch, L sequence length, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from hydralora.layer import RoutedModule, Routing, one_hot_argmax
from hydralora.statistics import PENDING

Layers = Sequence[Mapping[str, RoutedModule]]
"""For each decoder layer its parts with a router, by their name in it."""


class UtilizationWatch:
    """Counts the tokens of each sample by their most probable expert, for each part with a router.

    A part is counted once after its layer was entered. What else runs through it between two passes is not of the
    text, for example the modality tokens of another extension. What arrives is kept, and counted when somebody asks or
    there is much of it, so that a pass costs no operations.

    Args:
        layers: see `Layers`.
    """

    def __init__(self, layers: Layers) -> None:
        self._names = [frozenset(parts) for parts in layers]
        self._counts: dict[tuple[int, str], Tensor] = {}  # (B, E) float32 each, on the layer's device
        self._pending: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}  # probabilities and valid of passes
        self._kept = 0  # numbers in it
        self._index, self._expected, self._valid = -1, set[str](), torch.empty(0)

    def enter(self, index: int, valid: Tensor) -> None:
        """A pass enters layer `index` with tokens of which those of `valid` (B, L) bool are not padding."""
        self._index, self._expected, self._valid = index, set(self._names[index]), valid

    def note(self, index: int, name: str, routing: Routing) -> None:
        """A part with a router has run."""
        if index != self._index or name not in self._expected:
            return
        self._expected.remove(name)
        probabilities = routing.probabilities
        kept = probabilities.detach() if probabilities.requires_grad else probabilities
        self._pending.setdefault((index, name), []).append((kept, self._valid))
        self._kept += kept.numel()
        if self._kept > PENDING:
            self._count()

    @torch.no_grad()
    def _count(self) -> None:
        """Count what was kept, each part at once."""
        pending, self._pending, self._kept = self._pending, {}, 0
        for key, passes in pending.items():
            probabilities = torch.cat([kept.reshape(*valid.shape, -1) for kept, valid in passes], dim=1)  # (B, L, E)
            valid = torch.cat([valid for _, valid in passes], dim=1).to(probabilities)  # (B, L)
            counts = (one_hot_argmax(probabilities) * valid.unsqueeze(-1)).sum(dim=1)  # (B, E)
            before = self._counts.get(key)
            self._counts[key] = counts if before is None else before + counts

    def shares(self, row: int) -> dict[str, dict[int, tuple[float, ...]]]:
        """For each name of a part and each layer the share of each expert in the tokens of a sample so far."""
        self._count()
        found: dict[str, dict[int, tuple[float, ...]]] = {}
        for (index, name), counts in sorted(self._counts.items()):
            mine = counts[row].tolist()
            total = max(sum(mine), 1.0)
            found.setdefault(name, {})[index] = tuple(count / total for count in mine)
        return found


@contextmanager
def watch_utilization(layers: Layers) -> Iterator[UtilizationWatch]:
    """Count what runs through the layers while the block runs; `enter` has to be called before each of them."""
    watch = UtilizationWatch(layers)
    observers = [
        (part, partial(watch.note, index, name)) for index, parts in enumerate(layers) for name, part in parts.items()
    ]
    for part, observer in observers:
        part.observers.append(observer)
    try:
        yield watch
    finally:
        for part, observer in observers:
            part.observers.remove(observer)

"""The key-value cache of one sequence whose layers hold kept tokens alone from the sparse layer on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


class KeptCache(DynamicCache):
    """A cache of transformers 4.37 of which the sparse layers store what `plan` says.

    `seen_tokens` and the length of the first layer count every token, dropped ones included: positions go by them.

    Args:
        sparse_layer: first layer that holds kept tokens only.
    """

    def __init__(self, sparse_layer: int) -> None:
        super().__init__()
        self.sparse_layer = sparse_layer
        self._keep: Tensor | None = None

    @property
    def kept_tokens(self) -> int:
        """How many tokens each sparse layer holds."""
        return self.get_seq_length(self.sparse_layer)

    def plan(self, keep: Tensor) -> None:
        """Say which of the n tokens of this pass the sparse layers store; `keep` is (n,) bool."""
        self._keep = keep

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, stored and new ones, each (1, H, S + n, C); stores what was planned."""
        if layer_idx < self.sparse_layer:
            return super().update(key_states, value_states, layer_idx, cache_kwargs)
        if self._keep is None or len(self._keep) != key_states.shape[2]:
            raise ValueError(
                "a layer with dropped tokens was run without a plan of what it stores; call the whole model"
            )
        is_first = len(self) <= layer_idx
        held = (key_states[:, :, :0], value_states[:, :, :0]) if is_first else self[layer_idx]
        new = (key_states, value_states)
        seen = [torch.cat(pair, dim=2) for pair in zip(held, new, strict=True)]
        if bool(self._keep.all()):
            stored = seen
        elif not is_first and not bool(self._keep.any()):  # a dropped token: what is held is not copied
            stored = list(held)
        else:
            kept = [states[:, :, self._keep.to(states.device)] for states in new]
            stored = [torch.cat(pair, dim=2) for pair in zip(held, kept, strict=True)]
        if is_first:
            self.key_cache.append(stored[0])
            self.value_cache.append(stored[1])
        else:
            self.key_cache[layer_idx], self.value_cache[layer_idx] = stored
        return seen[0], seen[1]

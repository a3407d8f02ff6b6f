"""What a key-value cache knows of its rows: the modality of each, and the table of weights behind its keys and values.

Any cache of transformers' kind will do, that of another extension too. A cache whose rows change places, beams or a
choice of the caller's, takes the modalities along: from its first prompt on it is of a class that adds just that to the
class it had. Wrapped methods would do the same, but a cache that refers to itself keeps its memory until the garbage
collector comes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache

from mma.modality import Routing

MEMORY = "modality_routing"
"""Attribute of a cache under which it says of which modality its rows are."""


def remember(cache: Any, routing: Routing) -> None:
    """Let a cache know the modalities of its rows, and the table that its keys and values were computed with."""
    if isinstance(cache, Cache) and not isinstance(cache, _RowsOfModality):
        cache.__class__ = _with_modality(type(cache))
    setattr(cache, MEMORY, routing)


def remembered(cache: Any, batch: int) -> Routing:
    """What `remember` left in the cache.

    Raises:
        ValueError: nothing, or for another number of rows.
    """
    routing = getattr(cache, MEMORY, None)
    if not isinstance(routing, Routing):
        raise ValueError(
            "the modality of these tokens is unknown: a sequence begins with a call that has `input_ids` and `images`, "
            "or `inputs_embeds` with `segments`, and continues with the cache of that call"
        )
    if len(routing.modalities) != batch:
        raise ValueError(
            f"the cache holds {len(routing.modalities)} rows whose modality is known, but the batch has {batch}; the "
            "rows of a cache must stay those of its prompts"
        )
    return routing


class _RowsOfModality(Cache):
    """The methods of a cache by which rows change places; each also tells the memory."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        self._move(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` alone."""
        super().batch_select_indices(indices)
        self._move(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._move(lambda rows: rows.repeat_interleave(repeats))

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        routing: Routing = getattr(self, MEMORY)  # rows that are alike stay so
        setattr(self, MEMORY, dataclasses.replace(routing, modalities=move(routing.modalities)))


@functools.cache
def _with_modality(kind: type[Cache]) -> type[Cache]:
    """The class of caches of `kind` whose rows keep their modality; of the same name."""
    return type(kind.__name__, (_RowsOfModality, kind), {"__module__": __name__, "__doc__": kind.__doc__})

"""Layers of a cache whose keys and values are in slots: memory that is allocated ahead, a step at a time.

A new token is written into the next free slot of its row, so nothing that is stored is copied until the slots run out.
`WholeLayer` stores every position, `KeptLayer` those that were kept: there the number of tokens differs from row to
row, and the slot of a dropped token is overwritten by the next one.

Shape letters: B batch, K key heads, S stored positions (of the longest sample), n new positions, C width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

STEP = 64
"""A row of a cache has fewer free slots than this, unless more were reserved."""


def slots_for(tokens: int) -> int:
    """Slots of a row that holds `tokens`: a multiple of STEP / 2 with at least STEP / 4 free ones."""
    unit = STEP // 2
    return -(-(tokens + STEP // 4) // unit) * unit


def writable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it must not be written: autograd may have saved a view, or it is of inference mode."""
    if torch.compiler.is_compiling():
        return tensor
    of_inference = tensor.is_inference() and not torch.is_inference_mode_enabled()
    needed = torch.is_grad_enabled() or tensor.requires_grad or of_inference
    return tensor.clone() if needed else tensor


def _in_slots(states: Tensor, slots: int) -> Tensor:
    """`states` (B, K, n, C) in the first n of `slots` slots; the others are 0, since attention multiplies them by 0."""
    found = states.new_zeros(*states.shape[:2], slots, states.shape[3])
    found[:, :, : states.shape[2]] = states
    return found


class SlotLayer(CacheLayerMixin):
    """What both kinds of layers have in common.

    Attributes:
        buffers: keys and values with their free slots, (B, K, slots, C) each; None before the first pass.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        # Not the base's: its `keys` and `values` are attributes, here they are views of the slots that hold tokens.
        self.buffers: tuple[Tensor, Tensor] | None = None

    @property
    def is_initialized(self) -> bool:
        """True after the first pass."""
        return self.buffers is not None

    @property
    def slots(self) -> int:
        """Slots of a row, free ones included."""
        return 0 if self.buffers is None else self.buffers[0].shape[2]

    @property
    def keys(self) -> Tensor | None:
        """(B, K, S, C), a view."""
        return None if self.buffers is None else self.buffers[0][:, :, : self.get_seq_length()]

    @property
    def values(self) -> Tensor | None:
        """(B, K, S, C), a view."""
        return None if self.buffers is None else self.buffers[1][:, :, : self.get_seq_length()]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first pass allocates the slots."""

    def resize(self, slots: int) -> None:
        """Copy what is stored into as many slots for each row."""
        if self.buffers is not None:
            stored = min(slots, self.slots)
            self._replace(lambda states: _in_slots(states[:, :, :stored], slots))

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.buffers = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._replace(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` alone."""
        self._replace(lambda states: states[indices.to(states.device)])

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.buffers is not None:
            self.buffers = (change(self.buffers[0]), change(self.buffers[1]))


class WholeLayer(SlotLayer):
    """Keys and values of every position, padding included, as a dense model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, K, S + n, C) each, once the new ones (B, K, n, C) are stored."""
        before, self.length = self.length, self.length + key_states.shape[2]
        if self.buffers is None:
            slots = slots_for(self.length)
            self.buffers = (_in_slots(key_states, slots), _in_slots(value_states, slots))
            return key_states, value_states
        if self.length > self.slots:
            self.resize(slots_for(self.length))
        keys, values = self.buffers = (writable(self.buffers[0]), writable(self.buffers[1]))
        keys[:, :, before : self.length] = key_states
        values[:, :, before : self.length] = value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that attention sees, and their offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """S."""
        return self.length

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.length = 0


@dataclass
class Pass:
    """What the sparse layers do with the tokens of one pass; the same for all of them.

    Attributes:
        new: n, how many positions the layers will hand over.
        stored: S, the positions in front of them that attention sees.
        slots: of a row, from this pass on.
        write: (B, 1) int64, the slot of the one new token of each row. None if tokens are sorted out.
        index: (B, S_next) int64 into the S stored and then the n new positions: what stays; None if everything does.
    """

    new: int
    stored: int
    slots: int
    write: Tensor | None = None
    index: Tensor | None = None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """How many keys attention sees: those of a single token are all slots, whatever they hold."""
        return self.stored + self.new if self.write is None else self.slots

    def place(self, states: Tensor) -> Tensor | None:
        """`write` or `index` in the form of `states` (B, K, any, C): (B, K, 1 or S_next, C)."""
        given = self.index if self.write is None else self.write
        if given is None:
            return None
        if given.device != states.device:  # the layers of one model may be on several devices
            if states.device not in self._copies:
                self._copies[states.device] = given.to(states.device)
            given = self._copies[states.device]
        return given[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


class Counts(Protocol):
    """What a layer of kept tokens has to know of all of them.

    Attributes:
        plan: of the present pass, None before the first.
        slots: of a row.
    """

    plan: Pass | None
    slots: int

    def longest(self) -> int:
        """Tokens of the longest row."""


class KeptLayer(SlotLayer):
    """Keys and values of the kept tokens of one layer; those of each row are in its first slots."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to; stores what was planned.

        Args:
            key_states: (B, K, n, C).
            value_states: (B, K, n, C).
            args: not used; some backbones of transformers pass more.
            kwargs: not used.

        Returns:
            for one token on top of others all slots, (B, K, slots, C); else stored positions and new ones behind them.

        Raises:
            ValueError: nothing was planned for this pass.
        """
        plan = self.counts.plan
        if plan is None or plan.new != key_states.shape[2]:
            raise ValueError(
                f"the cache of 'dynamic' was told of {0 if plan is None else plan.new} new positions and gets "
                f"{key_states.shape[2]}: it serves only the model that made it, with the extension switched on"
            )
        if plan.write is None or self.buffers is None:
            return self._sort_out(plan, key_states, value_states)
        if self.slots != plan.slots:
            self.resize(plan.slots)
        keys, values = self.buffers = (writable(self.buffers[0]), writable(self.buffers[1]))
        keys.scatter_(2, plan.place(key_states), key_states)
        values.scatter_(2, plan.place(value_states), value_states)
        return keys, values

    def _sort_out(self, plan: Pass, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Store what stays of the stored and the new positions; returns all of them."""
        held = (None, None) if self.buffers is None else self.buffers
        full = [
            states if old is None or not plan.stored else torch.cat([old[:, :, : plan.stored], states], dim=2)
            for old, states in zip(held, new, strict=True)
        ]
        places = [plan.place(states) for states in full]
        kept = [states if at is None else states.gather(2, at) for states, at in zip(full, places, strict=True)]
        self.buffers = (_in_slots(kept[0], plan.slots), _in_slots(kept[1], plan.slots))
        return full[0], full[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that attention sees, and their offset."""
        plan = self.counts.plan
        return (query_length if plan is None else plan.keys), 0

    def get_seq_length(self) -> int:
        """S, the tokens of the longest row; waits for the device."""
        return self.counts.longest() if self.is_initialized else 0

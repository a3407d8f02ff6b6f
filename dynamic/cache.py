"""A key-value cache that holds kept tokens only, per layer and per sample (paper, section 3.4).

Corresponds to `cache_utils.py` of the original, which lets attention see the padding of a batch; here it is masked. The
dense layers below the sparse one store every position. From the sparse layer on each sample has its own number of
tokens, at the front of its slots (`slots.py`). Rules may drop tokens before several layers: the layers between two of
them are a stage, with numbers of its own. The numbers stay on the device; the host knows a bound of them and reads
them when that reaches the number of slots, so decoding waits for the device no more often than a dense model does.

Shape letters: B batch, K key heads, S stored positions (of the longest sample), n new positions, C width of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dynamic.slots import STEP, KeptLayer, Pass, WholeLayer, slots_for, writable

ASK_AHEAD = STEP // 8
"""How many tokens before the bound reaches the number of slots the host asks for the counts."""


def _no_rows() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


class Reading:
    """The number of tokens of the longest row on its way to the host; nobody waits for it before it is used."""

    def __init__(self, kept: Tensor, bound: int) -> None:
        self.bound = bound
        self.longest = kept.max().to("cpu", non_blocking=kept.is_cuda)
        self.arrived = torch.cuda.current_stream(kept.device).record_event() if kept.is_cuda else None

    def bound_now(self, bound: int) -> int:
        """A bound that takes the place of `bound`: what was read, and all tokens since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.longest) + bound - self.bound

    def __deepcopy__(self, memo: dict[int, Any]) -> Reading:
        """A copy whose number has arrived, since an event of the device cannot be copied."""
        if self.arrived is not None:
            self.arrived.synchronize()
        copied = copy.copy(self)
        copied.longest, copied.arrived = self.longest.clone(), None
        return copied


@dataclass
class Ledger:
    """What all layers of one cache share; it knows no layer, so that a dropped cache is freed at once.

    Attributes:
        kept: (B,) int64, stored tokens of each sample in a sparse layer; empty before the first pass.
        seen: (B,) int64, the same for a dense layer: all tokens, without padding.
        bound: no row has more kept tokens.
        slots: of a row in a sparse layer.
        reserved: what `slots` does not fall below.
        reading: of `kept`, if the host has asked.
        plan: of the present pass, None before the first.
    """

    kept: Tensor = field(default_factory=_no_rows)
    seen: Tensor = field(default_factory=_no_rows)
    bound: int = 0
    slots: int = 0
    reserved: int = 0
    reading: Reading | None = None
    plan: Pass | None = None

    def longest(self) -> int:
        """Tokens of the longest row; waits for the device."""
        return int(self.kept.max()) if len(self.kept) else 0

    def add(self, keep: Tensor, valid: Tensor) -> None:
        """Count the tokens of a pass, (B, n) bool each."""
        self.kept, self.seen = writable(self.kept), writable(self.seen)
        self.kept.add_(keep.sum(dim=1))
        self.seen.add_(valid.sum(dim=1))

    def set_rows(self, rows: Tensor) -> None:
        """Row i becomes row `rows[i]`."""
        if len(self.kept):
            rows = rows.to(self.kept.device)
            self.kept, self.seen = self.kept[rows], self.seen[rows]

    @torch.compiler.disable
    def ask(self) -> None:
        """Send for the counts."""
        self.reading = Reading(self.kept, self.bound)

    @torch.compiler.disable
    def make_room(self) -> None:
        """Take another bound and as many slots as it wants."""
        reading = self.reading or Reading(self.kept, self.bound)
        self.bound, self.reading = reading.bound_now(self.bound), None
        self.slots = max(slots_for(self.bound), self.reserved)


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        lengths: tokens of each sample, by layer: `lengths[layer][sample]`. Padding does not count.
        bytes_held: memory behind the keys and values, free slots included.
        bytes_of_tokens: what the tokens in `lengths` need.
        bytes_of_free_slots: less than `STEP` slots a row, unless more were reserved; what else `bytes_held` has
            beyond the tokens is padding.
    """

    lengths: list[list[int]]
    bytes_held: int
    bytes_of_tokens: int
    bytes_of_free_slots: int


class SparseCache(Cache):
    """Cache of one batch; whoever drops tokens plans each pass, stage by stage, and the layers carry it out.

    `get_seq_length()` is that of the first layer and counts every position, dropped ones included: positions and the
    2-D mask of `generate` go by it.

    Args:
        layers: number of decoder layers.
        sparse_layer: first layer that holds kept tokens only; 0: every layer does.
        further: layers, ascending, from which on still fewer tokens are kept.

    """

    def __init__(self, layers: int, sparse_layer: int, *further: int) -> None:
        self.starts = (sparse_layer, *further)
        bounds = [*self.starts, layers]
        if bounds != sorted(set(bounds)) or sparse_layer < 0:
            raise ValueError(f"stages begin at layers {self.starts} of {layers}; expected ascending ones from 0 on")
        self.ledgers = tuple(Ledger() for _ in self.starts)
        self._positions, self._is_planned = 0, False  # of a first layer that holds kept tokens only
        ranges = zip(self.ledgers, bounds, bounds[1:], strict=False)
        kept = (KeptLayer(ledger) for ledger, start, end in ranges for _ in range(start, end))
        super().__init__(layers=[*(WholeLayer() for _ in range(sparse_layer)), *kept])

    @property
    def sparse_layer(self) -> int:
        """First layer that holds kept tokens only."""
        return self.starts[0]

    @property
    def ledger(self) -> Ledger:
        """That of the first stage."""
        return self.ledgers[0]

    @property
    def is_filled(self) -> bool:
        """True if a pass was planned before."""
        return self.ledger.plan is not None

    def stored(self, device: torch.device) -> Tensor:
        """(B, S) bool, False at the padding of samples with fewer tokens than the longest; waits for the device."""
        return _first(self.ledger.kept, self.ledger.longest()).to(device)

    def plan_pass(self, keep: Tensor, valid: Tensor, stage: int = 0, positions: int | None = None) -> Tensor:
        """Say what the layers of a stage will store of the coming pass; call once, before the first of them runs.

        Args:
            keep: (B, n) bool.
            valid: (B, n) or (B, more) bool, False at padding: what the dense layers have seen.
            stage: of the layers, from 0.
            positions: of the pass, dropped ones and padding included, where stage 0 begins at layer 0; None: n.

        Returns:
            (B, keys) bool: which of the keys that the sparse layers return hold a token that may be seen. For one token
            on top of others they are the slots of its row, else the stored positions and behind them the n new ones.
        """
        if stage == 0 and self.sparse_layer == 0:
            self._positions += keep.shape[1] if positions is None else positions
            self._is_planned = True
        ledger = self.ledgers[stage]
        if ledger.plan is not None and keep.shape[1] == 1:
            return self._plan_token(ledger, keep, valid)
        if ledger.plan is None:
            ledger.kept = torch.zeros(len(keep), dtype=torch.long, device=keep.device)
            ledger.seen = torch.zeros_like(ledger.kept)
        before = ledger.kept.clone()
        ledger.add(keep, valid)
        sizes = torch.stack([before.max(), ledger.kept.max(), ledger.kept.min()])
        longest_before, longest, shortest = sizes.tolist()  # the only wait for the device
        full = torch.cat([_first(before, longest_before), keep], dim=1)  # (B, S + n)
        index = None
        if shortest < full.shape[1]:
            # A stable sort moves what is kept to the front and leaves it in order.
            index = full.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        ledger.bound, ledger.slots, ledger.reading = longest, max(slots_for(longest), ledger.reserved), None
        ledger.plan = Pass(keep.shape[1], longest_before, ledger.slots, index=index)
        return torch.cat([full[:, :longest_before], valid[:, -keep.shape[1] :]], dim=1)

    @staticmethod
    def _plan_token(ledger: Ledger, keep: Tensor, valid: Tensor) -> Tensor:
        """As `plan_pass`, for one token of each row: written into the first free slot, without waiting for the device.

        If it is not kept, the next one is written into the same slot.
        """
        if ledger.bound + 1 > ledger.slots:
            ledger.make_room()
        write = ledger.kept[:, None].clone()
        visible = _first(ledger.kept + valid[:, -1], ledger.slots)
        ledger.add(keep, valid)
        ledger.bound += 1
        if ledger.bound + ASK_AHEAD == ledger.slots:
            ledger.ask()
        ledger.plan = Pass(1, ledger.slots - 1, ledger.slots, write=write)
        return visible

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more in every layer at once, behind a prompt.

        Until they are there no shape of a sparse layer changes and no memory moves, as a model that was compiled for
        fixed shapes requires. The memory is that of `tokens` more for each row.

        Raises:
            ValueError: the cache is empty.
        """
        if not self.is_filled:
            raise ValueError(f"reserve({tokens}) follows the prompt, but this cache is empty; run the prompt first")
        for ledger in self.ledgers:
            ledger.reserved = ledger.slots = max(ledger.slots, slots_for(ledger.bound + tokens))
        for layer in self.layers:
            if isinstance(layer, KeptLayer):
                layer.resize(layer.counts.slots)
            else:
                layer.resize(max(layer.slots, slots_for(layer.get_seq_length() + tokens)))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """What the layer stores and returns."""
        if layer_idx == 0:
            self._is_planned = False
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _counts_positions(self, layer_idx: int) -> bool:
        """Whether the first layer is asked by somebody who knows nothing of what will be dropped in front of it."""
        return layer_idx == 0 and self.sparse_layer == 0 and not self._is_planned

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions stored in a layer; of the first one always all that went through the decoder."""
        if layer_idx == 0 and self.sparse_layer == 0:
            return self._positions
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length of the keys that attention sees in a layer, and their offset."""
        if self._counts_positions(layer_idx):
            return self._positions + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the first query of the present pass is among the keys that attention sees."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, KeptLayer) or self._counts_positions(layer_idx):
            return self.get_seq_length(layer_idx)
        plan = layer.counts.plan
        return 0 if plan is None else plan.keys - plan.new

    def report(self) -> CacheReport:
        """Lengths by layer and sample, and the memory behind them; waits for the device."""
        seen = self.ledger.seen.tolist()
        kept = {id(ledger): ledger.kept.tolist() for ledger in self.ledgers}
        lengths = [
            [] if not layer.is_initialized else kept[id(layer.counts)] if isinstance(layer, KeptLayer) else seen
            for layer in self.layers
        ]
        held = needed = free = 0
        for layer, tokens in zip(self.layers, lengths, strict=True):
            for states in layer.buffers or ():
                held += states.untyped_storage().nbytes()
                bytes_of_slot = states.shape[1] * states.shape[3] * states.element_size()
                needed += sum(tokens) * bytes_of_slot
                free += len(tokens) * (layer.slots - layer.get_seq_length()) * bytes_of_slot
        return CacheReport(lengths, held, needed, free)

    def reset(self) -> None:
        """Forget everything; the next pass is a first one."""
        for layer in self.layers:
            layer.reset()
        for ledger in self.ledgers:
            vars(ledger).update(vars(Ledger()))
        self._positions, self._is_planned = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: which of the last tokens were stored differs from sample to sample.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"crop({tokens_to_remove}): a cache of kept tokens cannot be rolled back, so assisted and speculative "
            "decoding do not work with 'dynamic'; generate without assistant_model and prompt_lookup_num_tokens"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]` (beam search)."""
        super().reorder_cache(beam_idx)
        for ledger in self.ledgers:
            ledger.set_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        for ledger in self.ledgers:
            ledger.kept, ledger.seen = (counts.repeat_interleave(repeats) for counts in (ledger.kept, ledger.seen))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` alone; slots that only the others needed go with the next token."""
        super().batch_select_indices(indices)
        for ledger in self.ledgers:
            ledger.set_rows(indices)
            ledger.bound, ledger.reading = ledger.slots, None


def _first(counts: Tensor, places: int) -> Tensor:
    """(B, places) bool, True in the first `counts` (B,) places of each row."""
    return torch.arange(places, device=counts.device) < counts[:, None]

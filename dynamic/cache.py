"""A key-value cache that holds kept tokens only, per layer and per sample (paper, section 3.4).

Corresponds to `cache_utils.py` of the original, which lets attention see the padding of a batch; here it is masked. The
dense layers below the sparse one store every position in transformers' own layers. From the sparse layer on each sample
has its own number of tokens; they stand at the front of the tensors, which are as long as the longest sample needs.

Shape letters: B batch, K key heads, S stored positions (of the longest sample), n new positions, C width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


@dataclass
class StoragePlan:
    """Which of the stored and new positions a pass leaves in the cache; the same for all sparse layers.

    Attributes:
        new: n, how many positions the layers will hand over.
        index: (B, S_next) int64 into the S stored and then the n new positions; None stores everything.
        unchanged: True if nothing is added and nothing moves.
    """

    new: int
    index: Tensor | None = None
    unchanged: bool = False
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def select(self, states: Tensor) -> Tensor:
        """What stays of keys or values (B, K, S + n, C): a tensor of its own, (B, K, S_next, C)."""
        if self.index is None:
            return states.contiguous()
        if states.device not in self._copies:  # the layers of one model may lie on several devices
            self._copies[states.device] = self.index.to(states.device)
        index = self._copies[states.device][:, None, :, None]
        return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))


@dataclass
class Ledger:
    """What all layers of one cache share; it knows no layer, so that a dropped cache is freed at once.

    Attributes:
        kept: (B,) int64 on the CPU, stored tokens of each sample in a sparse layer; empty before the first pass.
        seen: (B,) int64 on the CPU, the same for a dense layer: all tokens, without padding.
        plan: of the present pass, None before the first.
    """

    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    plan: StoragePlan | None = None


class KeptLayer(CacheLayerMixin):
    """Keys and values of the kept tokens of one layer, each (B, K, S, C)."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device, and hold no position yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, stored and new ones; stores what was planned.

        Args:
            key_states: (B, K, n, C).
            value_states: (B, K, n, C).
            args: not used; some backbones of transformers pass more.
            kwargs: not used.

        Raises:
            ValueError: nothing was planned for this pass.
        """
        plan = self.ledger.plan
        if plan is None or plan.new != key_states.shape[2]:
            raise ValueError(
                f"the cache of 'dynamic' was told of {0 if plan is None else plan.new} new positions and gets "
                f"{key_states.shape[2]}: it serves only the model that made it, with the extension switched on"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = (self.keys, self.values)
        full = [
            torch.cat([old, new], dim=2) if old.shape[2] else new
            for old, new in zip(held, (key_states, value_states), strict=True)
        ]
        if not plan.unchanged:
            self.keys, self.values = (plan.select(states) for states in full)
        return full[0], full[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that attention sees, and their offset."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """S, the number of positions in memory."""
        return self.keys.shape[2] if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` alone."""
        if self.is_initialized:
            self.keys = self.keys[indices.to(self.keys.device)]
            self.values = self.values[indices.to(self.values.device)]


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        lengths: tokens of each sample, by layer: `lengths[layer][sample]`. Padding does not count.
        bytes_held: memory behind the keys and values.
        bytes_of_tokens: what the tokens in `lengths` need; less than `bytes_held` by the padding of a batch.
    """

    lengths: list[list[int]]
    bytes_held: int
    bytes_of_tokens: int


class SparseCache(Cache):
    """Cache of one batch; `Extension.before_layer` plans each pass, the layers then carry it out.

    `get_seq_length()` is that of the first layer and counts every position, dropped ones included: positions and the
    2-D mask of `generate` go by it.

    Args:
        layers: number of decoder layers.
        sparse_layer: first layer that holds kept tokens only.

    """

    def __init__(self, layers: int, sparse_layer: int) -> None:
        self.ledger = Ledger()
        self.sparse_layer = sparse_layer
        dense: list[CacheLayerMixin] = [DynamicLayer() for _ in range(sparse_layer)]
        super().__init__(layers=[*dense, *(KeptLayer(self.ledger) for _ in range(sparse_layer, layers))])

    @property
    def is_filled(self) -> bool:
        """True if a pass was planned before."""
        return len(self.ledger.kept) > 0

    def stored(self, device: torch.device) -> Tensor:
        """(B, S) bool, False at the padding of samples with fewer tokens than the longest."""
        places = torch.arange(self.layers[self.sparse_layer].get_seq_length())
        return (places < self.ledger.kept[:, None]).to(device)

    def plan_pass(self, keep: Tensor, valid: Tensor) -> None:
        """Say what the sparse layers will store of the coming pass; call once, before the first of them runs.

        Args:
            keep: (B, n) bool.
            valid: (B, n) or (B, more) bool, False at padding: what the dense layers have seen.
        """
        ledger = self.ledger
        if not self.is_filled:
            ledger.kept = ledger.seen = torch.zeros(len(keep), dtype=torch.long)
        new, stored = keep.shape[1], self.stored(keep.device)
        counts = torch.stack([keep.sum(dim=1), valid.sum(dim=1)]).cpu()  # the only wait for the device
        ledger.kept, ledger.seen = ledger.kept + counts[0], ledger.seen + counts[1]
        longest, before = int(ledger.kept.max()), stored.shape[1]
        if longest == before and not bool(counts[0].any()):
            ledger.plan = StoragePlan(new, unchanged=True)
        elif bool((ledger.kept == before + new).all()):
            ledger.plan = StoragePlan(new)
        else:
            full = torch.cat([stored, keep], dim=1)  # (B, S + n)
            # A stable sort moves what is kept to the front and leaves it in order.
            index = full.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
            ledger.plan = StoragePlan(new, index)

    def report(self) -> CacheReport:
        """Lengths by layer and sample, and the memory behind them."""
        lengths = [
            (self.ledger.kept if isinstance(layer, KeptLayer) else self.ledger.seen).tolist()
            if layer.is_initialized
            else []
            for layer in self.layers
        ]
        held = needed = 0
        for layer, counts in zip(self.layers, lengths, strict=True):
            for states in (layer.keys, layer.values) if layer.is_initialized else ():
                held += states.untyped_storage().nbytes()
                needed += sum(counts) * states.shape[1] * states.shape[3] * states.element_size()
        return CacheReport(lengths, held, needed)

    def reset(self) -> None:
        """Forget everything; the next pass is a first one."""
        self.layers[: self.sparse_layer] = [DynamicLayer() for _ in range(self.sparse_layer)]
        for layer in self.layers[self.sparse_layer :]:
            layer.reset()
        self.ledger.plan, self.ledger.kept, self.ledger.seen = None, self.ledger.kept[:0], self.ledger.seen[:0]

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
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        ledger = self.ledger
        ledger.kept, ledger.seen = (counts.repeat_interleave(repeats) for counts in (ledger.kept, ledger.seen))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices` alone."""
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.is_filled:
            rows, ledger = rows.cpu(), self.ledger
            ledger.kept, ledger.seen = ledger.kept[rows], ledger.seen[rows]

"""Leaving positions out of all that travels between two layers: hidden states, positions, masks, segments.

Nothing here decides; `inference.py` says which positions stay. Corresponds to the gathering in the original's
`DynamicLlamaModel.forward`, which renumbers positions and loses the padding mask; here both are kept.

Shape letters: B batch, L sequence length, D width, C head width, S cached positions; `kept` is what the longest sample
keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from llava.runtime.cache_name import cache_argument


class State(Protocol):
    """What enters a decoder layer; `DecoderState` of llava is such, and any dataclass with these fields.

    Attributes:
        hidden_states: (B, L, D).
        attention_mask: (B, S + L) or None, zero at padding.
        position_ids: (B or 1, L).
        position_embeddings: cosine and sine, each (B or 1, L, C).
        causal_mask: what the attention implementation wants.
        cache: keys and values of earlier positions, or None.
        segments: the parts of each sample when prompts begin, None on later passes.
    """

    hidden_states: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    causal_mask: Any
    cache: Cache | None
    segments: Any


def valid_positions(state: State) -> Tensor:
    """(B, L) bool, False at padding."""
    batch, length, _ = state.hidden_states.shape
    if state.attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=state.hidden_states.device)
    return state.attention_mask[:, -length:].bool().to(state.hidden_states.device)


def shorten(model: nn.Module, layer: int, state: State, keep: Tensor, valid: Tensor) -> State:
    """The sequence of the kept positions, in their order, with everything that belongs to a position.

    Samples that keep fewer than others are padded on the side on which the batch was padded; a batch without padding is
    padded on the left, so that its last position stays that of the last token.

    Args:
        model: the causal language model.
        layer: that is entered.
        state: of L positions.
        keep: (B, L) bool.
        valid: (B, L) bool, False at padding.
    """
    counts = keep.sum(dim=1, keepdim=True)  # (B, 1)
    longest = int(counts.max())
    places = torch.arange(longest, device=keep.device)
    on_the_left = bool(valid[:, -1].all())
    if on_the_left:  # stable sorts leave kept positions in their order
        index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -longest:]  # (B, kept)
        filled = places >= longest - counts
    else:
        index = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        filled = places < counts
    state = take_positions(state, index)
    if state.segments is not None:
        offsets = (longest - counts).flatten().tolist() if on_the_left else [0] * len(keep)
        before = torch.cat([keep.new_zeros(len(keep), 1), keep], dim=1).cumsum(dim=1).tolist()  # L + 1 each
        moved = [_move(*row) for row in zip(state.segments, before, offsets, strict=True)]
        state = replace(state, segments=moved)
    return with_mask(model, layer, state, filled)


def take_positions(state: State, index: Tensor) -> State:
    """Hidden states, positions and rotary embeddings of the positions `index` (B, kept); masks are left as they are."""
    rows = torch.arange(len(index), device=index.device)[:, None]

    def take(x: Tensor) -> Tensor:  # (B or 1, L, ...) -> (B, kept, ...)
        return x.to(index.device).expand(len(index), *x.shape[1:])[rows, index]

    cos, sin = state.position_embeddings
    return replace(
        state,
        hidden_states=take(state.hidden_states),
        position_ids=take(state.position_ids),
        position_embeddings=(take(cos), take(sin)),
    )


def _move(segments: Any, before: Sequence[int], offset: int) -> Any:
    """The parts of a shortened sample: `before[i]` positions are kept before i, behind `offset` of padding."""

    def moved(span: Any) -> Any:
        return span._replace(start=before[span.start] + offset, end=before[span.end] + offset)

    return replace(
        segments,
        system=moved(segments.system),
        images=tuple(moved(span) for span in segments.images),
        instruct=moved(segments.instruct),
        last_instruct=moved(segments.last_instruct),
        answer=moved(segments.answer),
    )


def with_mask(model: nn.Module, layer: int, state: State, visible: Tensor, *, always: bool = False) -> State:
    """`state` with masks in front of `layer` for keys of which `visible` (B, S + L) are to be seen.

    Where all are, there is no mask; to find out, the host waits for the device. With `always` there is one in any case.
    """
    host: Any = model
    mask = None if not always and bool(visible.all()) else visible
    causal_mask = create_causal_mask(
        config=host.get_decoder().config,
        inputs_embeds=state.hidden_states,
        attention_mask=mask,
        layer_idx=layer,
        allow_is_causal_skip=not always,
        # No position_ids: their gaps would be taken for the borders of packed sequences.
        **cache_argument(create_causal_mask, state.cache),
    )
    return replace(state, attention_mask=mask, causal_mask=causal_mask)

"""What travels through a multimodal sequence: where its parts lie, the spliced batch, the state between layers.

Plain data that everybody may use: `splice` computes the segments once, and training, the decoder loop and the
extensions read them (Dynamic-LLaVA's rules of segments; seams 2 and 4 of `llava/extension.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache


class Span(NamedTuple):
    """Half-open range of positions `[start, end)` in the multimodal sequence of one sample."""

    start: int
    end: int


@dataclass(frozen=True)
class Segments:
    """Where the parts of one sample lie in the spliced sequence, padding included (Dynamic-LLaVA, segment rules).

    `instruct` reaches from the last image to the last answer and so holds earlier turns; `last_instruct` is the part
    of it that begins at the last user marker. Empty spans have `start == end`.
    """

    system: Span
    images: tuple[Span, ...]
    instruct: Span
    last_instruct: Span
    answer: Span

    @property
    def has_image(self) -> bool:
        """True if at least one image was spliced in."""
        return bool(self.images)


def row_segments(
    images: Sequence[Span], length: int, answer_start: int, text_after_image: list[int], marker: Sequence[int]
) -> Segments:
    """Segments of one row before truncation and padding.

    Args:
        images: where they lie in the spliced row.
        length: of the spliced row.
        answer_start: behind the last ignored label of the spliced row.
        text_after_image: token ids behind the last image, or all of a row without.
        marker: token ids that open a user turn; empty if unknown.
    """
    system_end = images[0].start if images else 0
    instruct_start = min(images[-1].end if images else 0, answer_start)
    offset = _find_last(text_after_image[: answer_start - instruct_start], marker)
    return Segments(
        system=Span(0, system_end),
        images=tuple(images),
        instruct=Span(instruct_start, answer_start),
        last_instruct=Span(instruct_start + offset, answer_start),
        answer=Span(answer_start, length),
    )


def shifted(segments: Segments, limit: int, offset: int) -> Segments:
    """Cut every bound at `limit` (truncation), then move it by `offset` (left padding)."""

    def moved(span: Span) -> Span:
        return Span(min(span.start, limit) + offset, min(span.end, limit) + offset)

    return Segments(
        system=moved(segments.system),
        images=tuple(moved(span) for span in segments.images),
        instruct=moved(segments.instruct),
        last_instruct=moved(segments.last_instruct),
        answer=moved(segments.answer),
    )


def _find_last(ids: list[int], marker: Sequence[int]) -> int:
    """Start of the last occurrence of `marker` in `ids`; 0 if there is none."""
    size = len(marker)
    starts = (start for start in range(len(ids) - size, -1, -1) if ids[start : start + size] == list(marker))
    return next(starts, 0) if size else 0


@dataclass
class MultimodalInputs:
    """A batch after images were spliced into text (seam 2).

    Attributes:
        inputs_embeds: (B, L, D), padding positions zero.
        labels: (B, L) int64 with -100 where ignored, or None.
        attention_mask: (B, L) bool, False at padding, or None when nothing is padded.
        position_ids: (B, L) int64 counting real tokens from 0, or None.
        segments: one `Segments` per sample.
    """

    inputs_embeds: Tensor
    labels: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    segments: list[Segments]


@dataclass
class DecoderState:
    """Everything that travels from one decoder layer to the next (seam 4).

    Attributes:
        hidden_states: (B, L, D).
        attention_mask: (B, L_total) 2-D mask that `causal_mask` was made from, or None.
        position_ids: (B, L) or (1, L) int64.
        position_embeddings: rotary cosine and sine, each (B or 1, L, C).
        causal_mask: the mask in the form the attention implementation wants; None where it needs none.
        cache: key-value cache, or None.
        segments: one per sample during prefill and training, None while single tokens are decoded.
        layer_kwargs: extra keyword arguments for every following layer; they reach the attention function.
        carried: what an extension takes along from layer to layer, by the extension's name; it reaches no layer.
    """

    hidden_states: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    causal_mask: Any
    cache: Cache | None
    segments: list[Segments] | None
    layer_kwargs: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)

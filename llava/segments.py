"""What travels through a multimodal sequence: its parts, the plan of a batch, the spliced batch, the decoder's state.

Plain data that everybody may use: `llava/data/splice_plan.py` computes the segments once, and training, the decoder
loop and the extensions read them (Dynamic-LLaVA's rules of segments; seams 2 and 4 of `llava/extension.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
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
    of it that begins at the last user marker. Empty spans have `start == end`. `notes` has what extensions noted of the
    images in `on_inputs`, by their name; it goes with the sample, to every beam of it.
    """

    system: Span
    images: tuple[Span, ...]
    instruct: Span
    last_instruct: Span
    answer: Span
    notes: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

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


@dataclass(frozen=True)
class SpliceOptions:
    """What decides the shape of a spliced batch.

    Attributes:
        max_length: longest sequence of tokens and patches (`tokenizer_model_max_length`), or None for no limit.
        padding_side: `left` or `right` (`tokenizer_padding_side`).
        user_marker: token ids that open a user turn, for `Segments.last_instruct`; empty if unknown.
    """

    max_length: int | None
    padding_side: str
    user_marker: tuple[int, ...] = ()

    @classmethod
    def of_config(cls, config: Any) -> SpliceOptions:
        """Lengths and sides as the configuration of a LLaVA has them."""
        return cls(
            max_length=getattr(config, "tokenizer_model_max_length", None),
            padding_side=getattr(config, "tokenizer_padding_side", "right"),
            user_marker=tuple(getattr(config, "user_marker_ids", ()) or ()),
        )


@dataclass(frozen=True)
class PackedRows:
    """Where the samples of rows with several of them are (`--packing`); n samples, in the order of the batch.

    Attributes:
        samples: (B, L) int64, the number of the sample at each position; n at padding.
        bounds: (sequences + 1,) int32, where each sample begins in the flattened (B L), and what pads a row as a
            sequence of its own; the last one is B L.
        longest: of the sequences between two bounds.
        rows: the row of each sample.
        positions: predicted positions that the batch would have with one sample a row, ignored ones included.
    """

    samples: Tensor
    bounds: Tensor
    longest: int
    rows: tuple[int, ...]
    positions: int

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedRows:
        """The same with its tensors on `device`; nothing is waited for."""
        samples, bounds = (each.to(device, non_blocking=non_blocking) for each in (self.samples, self.bounds))
        return replace(self, samples=samples, bounds=bounds)

    def pin_memory(self) -> PackedRows:
        """The same in memory that copies to a GPU do not wait for."""
        return replace(self, samples=self.samples.pin_memory(), bounds=self.bounds.pin_memory())

    def sums(self, values: Tensor) -> Tensor:
        """(n, ...): the sum of values (B, L, ...) over the positions of each sample."""
        count = len(self.rows)
        found = values.new_zeros(count + 1, *values.shape[2:])
        return found.index_add(0, self.samples.to(values.device).flatten(), values.flatten(0, 1))[:count]

    def spread(self, values: Tensor) -> Tensor:
        """(B, L, ...): at each position the entry of its sample in `values` (n, ...); zero at padding."""
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded[self.samples.to(values.device)]


@dataclass(frozen=True)
class SplicePlan:
    """A batch as it is after splicing, but for the embeddings.

    All tensors are on one device. The features of a batch are the rows (P_i, D) of all its images one after another,
    those of images that stand for none included.

    Attributes:
        input_ids: (B, L) int64, 0 at padding and images.
        labels: (B, L) int64, -100 where ignored.
        attention_mask: (B, L) bool, False at padding.
        position_ids: (B, L) int64, counting the tokens of a sample from 0; 0 at padding.
        slots: (features,) int64, the places in the flattened (B L) that features take, in their order.
        feature_rows: (features,) int64, which features they are; None: all of them.
        features: number of features of the batch; None for a batch without images.
        target_positions: (targets,) int64, places in the flattened (B L) whose prediction is trained, padded by 0.
        target_labels: (targets,) int64, the label predicted there; -100 at padding, so one place is always listed.
        targets: how many of them count.
        padding: `left` or `right`, or `none` if all rows are equally long.
        options: what the plan was made with.
        segments: one per sample, in the positions of its row.
        source: (B, T) int64 with image tokens, the ids that it was made of, where they were then.
        packed: where the samples are, if rows may have several of them; None: every row is one.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    slots: Tensor
    feature_rows: Tensor | None
    features: int | None
    target_positions: Tensor
    target_labels: Tensor
    targets: int
    padding: str
    options: SpliceOptions
    segments: list[Segments]
    source: Tensor
    packed: PackedRows | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> SplicePlan:
        """The plan with its tensors on `device`; nothing is waited for."""
        if self.input_ids.device == torch.device(device):
            return self
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self._tensors().items()}
        return replace(self, **moved, packed=self.packed and self.packed.to(device, non_blocking))

    def pin_memory(self) -> SplicePlan:
        """The plan in memory that copies to a GPU do not wait for; called by `DataLoader`."""
        pinned = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **pinned, packed=self.packed and self.packed.pin_memory())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "source"}


@dataclass
class MultimodalInputs:
    """A batch after images were spliced into text (seam 2).

    Attributes:
        inputs_embeds: (B, L, D), padding positions zero.
        labels: (B, L) int64 with -100 where ignored, or None.
        attention_mask: (B, L) bool, False at padding, or None when nothing is padded.
        position_ids: (B, L) int64 counting real tokens from 0, or None.
        segments: one `Segments` per sample.
        plan: what the batch was made by, if by a plan; knows where padding and
            targets are. Whoever changes lengths or labels sets it to None.
        packed: see `SplicePlan`; `segments` has one entry per sample, not per row.
        image_notes: for each image, the dummies of rows without any included, what extensions noted in `on_images`;
            None if there are no images or nobody asked for them.
    """

    inputs_embeds: Tensor
    labels: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    segments: list[Segments]
    plan: SplicePlan | None = None
    packed: PackedRows | None = None
    image_notes: list[dict[str, Any]] | None = None


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
        packed: where the samples are, if rows may have several of them; None: every row is one.
    """

    hidden_states: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    causal_mask: Any
    cache: Cache | None
    segments: list[Segments] | None
    layer_kwargs: dict[str, Any] = field(default_factory=dict)
    packed: PackedRows | None = None

"""Where everything of a batch goes when images are put into its text, decided from ids and lengths alone, on the CPU.

The collator makes the plan in the processes that read the data; the model (`llava/model/splice.py`) then does one
embedding and one scatter, and waits for nothing. Ids that reach the model without a plan get one by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data.packing import Place, arrange
from llava.data.targets import find_targets
from llava.data.tiling import ImageLength
from llava.segments import PackedRows, Segments, Span, SpliceOptions, SplicePlan, row_segments, shifted


@dataclass(frozen=True)
class SplicePlanner:
    """Makes the plans for the batches of one model; has its settings and none of its weights.

    Attributes:
        config: of the model; settings that change later hold for later plans.
        image_length: says how many positions an image takes; None for a model without tower, which sees no images.
        packing: put several samples into a row (`--packing`).
    """

    config: Any
    image_length: ImageLength | None
    packing: bool = False

    def __call__(self, batch: Mapping[str, Any]) -> SplicePlan:
        """Plan a collated batch with `input_ids`, `labels`, `attention_mask`, and `images` if it has any.

        Raises:
            ValueError: as of `plan_splice`.
        """
        images, sizes = batch.get("images"), batch.get("image_sizes")
        options = SpliceOptions.of_config(self.config)
        lengths = None
        if images is not None and self.image_length is not None:
            pairs = zip(images, [(1, 1)] * len(images) if sizes is None else sizes, strict=True)
            lengths = [self.image_length(image, tuple(size)) for image, size in pairs]
        return plan_splice(batch["input_ids"], batch["labels"], batch["attention_mask"], lengths, options, self.packing)


@dataclass(frozen=True)
class _Row:
    """One row, neither cut nor padded: where its tokens and its images begin."""

    ids: Tensor  # (T,) without image tokens
    labels: Tensor  # (T,) of these tokens
    places: Tensor  # (T,) of these tokens in the spliced row
    images: list[Span]  # in the spliced row
    first: list[int]  # of each image, the first of its features within the batch
    length: int


def check_image_count(per_row: Sequence[int], available: int) -> None:
    """Every image token takes one image; a row without any takes its dummy image.

    Raises:
        ValueError: another number of images is there; names both.
    """
    needed = sum(max(1, count) for count in per_row)
    if needed != available:
        raise ValueError(
            f"the batch needs {needed} images (image tokens per row: {list(per_row)}; a row without any takes one "
            f"dummy image), but {available} were given. Pass one image per <image>, in row order."
        )


def plan_splice(
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    image_lengths: Sequence[int] | None,
    options: SpliceOptions,
    packing: bool = False,
) -> SplicePlan:
    """Plan the splicing of a batch, on the CPU; ids on another device are waited for, once.

    Args:
        input_ids: (B, T) with `IMAGE_TOKEN_INDEX` at images; padded on any side.
        labels: (B, T) or None (inference: everything counts as ignored).
        attention_mask: (B, T), zero at padding, or None.
        image_lengths: P of each image in row order, one per image token; a row without image token has one that adds
            nothing. None for a batch that never had images: it is not cut, as upstream cuts where it splices.
        options: lengths, sides and marker.
        packing: put several samples into a row of at most `max_length`; rows are padded on the right then.

    Raises:
        ValueError: more or fewer images than the rows need, or image tokens without any image.
    """
    ids, targets, valid = _on_host(input_ids, labels, attention_mask)
    counts = (valid & (ids == IMAGE_TOKEN_INDEX)).sum(dim=1).tolist()
    if image_lengths is not None:
        check_image_count(counts, len(image_lengths))
    elif any(counts):
        missing = [row for row, count in enumerate(counts) if count]
        raise ValueError(f"rows {missing} hold <image> tokens, but no images were passed")
    rows: list[_Row] = []
    segments: list[Segments] = []
    used = features = 0
    for row_ids, row_labels, keep, count in zip(ids, targets, valid, counts, strict=True):
        mine = [] if image_lengths is None else list(image_lengths[used : used + max(1, count)])
        used += len(mine)
        row, parts = _plan_row(row_ids[keep], row_labels[keep], mine[:count], features, options)
        features += sum(mine)
        rows.append(row)
        segments.append(parts)
    capacity = options.max_length
    if image_lengths is None:
        options = replace(options, max_length=None)
    limits = [row.length if options.max_length is None else min(row.length, options.max_length) for row in rows]
    if packing:
        layout = _Layout(limits, arrange(limits, capacity), "right")
    else:
        layout = _Layout.of_rows(limits, options.padding_side)
    plan = _assembled(rows, segments, None if image_lengths is None else features, options, layout, input_ids)
    return replace(plan, packed=_packed_rows(layout)) if packing else plan


def _on_host(input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask (B, T) on the CPU, brought there together."""
    parts = [
        input_ids,
        torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels,
        torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype),
    ]
    ids, targets, valid = torch.stack(parts).cpu() if input_ids.device.type != "cpu" else parts
    return ids, targets, valid.bool()


def _plan_row(
    ids: Tensor, labels: Tensor, lengths: Sequence[int], first: int, options: SpliceOptions
) -> tuple[_Row, Segments]:
    """Plan one row without padding.

    Args:
        ids: (T,) with image tokens.
        labels: (T,).
        lengths: P of the image at each image token.
        first: number of the first feature of its first image within the batch.
        options: for the marker.
    """
    is_text = ids != IMAGE_TOKEN_INDEX
    taken = torch.ones_like(ids)
    taken[~is_text] = torch.tensor(lengths, dtype=ids.dtype)
    ends = taken.cumsum(0)
    length = int(ends[-1]) if len(ends) else 0
    starts = (ends - taken)[~is_text].tolist()
    spans = [Span(start, start + size) for start, size in zip(starts, lengths, strict=True)]
    firsts = [first + sum(lengths[:number]) for number in range(len(lengths))]
    row = _Row(ids[is_text], labels[is_text], (ends - taken)[is_text], spans, firsts, length)
    after = ids.tolist()
    if spans:
        after = after[len(after) - after[::-1].index(IMAGE_TOKEN_INDEX) :]
    spliced = torch.full((length,), IGNORE_INDEX)
    spliced[row.places] = row.labels.long()
    return row, row_segments(spans, length, answer_start(spliced), after, options.user_marker)


def answer_start(labels: Tensor) -> int:
    """Where the last answer of a row begins: behind its last ignored label; `labels` is (L,)."""
    ignored = (labels == IGNORE_INDEX).nonzero().flatten()
    return int(ignored[-1]) + 1 if len(ignored) else 0


@dataclass(frozen=True)
class _Layout:
    """Where the samples of a batch are.

    Attributes:
        lengths: of each sample, after it was cut.
        places: of each sample.
        side: that padding is on.
    """

    lengths: Sequence[int]
    places: Sequence[Place]
    side: str

    @classmethod
    def of_rows(cls, lengths: Sequence[int], side: str) -> _Layout:
        """A row for each sample."""
        longest = max(lengths, default=0)
        starts = [longest - length if side == "left" else 0 for length in lengths]
        return cls(lengths, [Place(row, start) for row, start in enumerate(starts)], side)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        ends = [place.start + length for place, length in zip(self.places, self.lengths, strict=True)]
        return max((place.row + 1 for place in self.places), default=0), max(ends, default=0)


def _assembled(
    rows: Sequence[_Row],
    segments: Sequence[Segments],
    features: int | None,
    options: SpliceOptions,
    layout: _Layout,
    source: Tensor,
) -> SplicePlan:
    """Cut the samples and put them in their places."""
    batch, longest = layout.shape
    ids = torch.zeros(batch, longest, dtype=torch.long)
    labels = torch.full((batch, longest), IGNORE_INDEX)
    mask = torch.zeros(batch, longest, dtype=torch.bool)
    positions = torch.zeros(batch, longest, dtype=torch.long)
    slots, sources, moved = [], [], []
    for row, length, (index, offset), parts in zip(rows, layout.lengths, layout.places, segments, strict=True):
        kept = row.places < length
        places = row.places[kept] + offset
        ids[index, places] = row.ids[kept].long()
        labels[index, places] = row.labels[kept].long()
        if offset and length and layout.side == "right":
            labels[index, offset] = IGNORE_INDEX  # the sample in front of it must not predict how it begins
        mask[index, offset : offset + length] = True
        positions[index, offset : offset + length] = torch.arange(length)
        for span, first in zip(row.images, row.first, strict=True):
            size = max(0, min(span.end, length) - span.start)
            slots.append(torch.arange(size) + (index * longest + offset + span.start))
            sources.append(torch.arange(size) + first)
        moved.append(shifted(parts, length, offset))
    found = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.long)
    which = torch.cat(sources) if sources else torch.zeros(0, dtype=torch.long)
    found_targets = find_targets(labels)
    return SplicePlan(
        input_ids=ids,
        labels=labels,
        attention_mask=mask,
        position_ids=positions,
        slots=found,
        # Every feature is placed in its turn unless a row is cut or has no image.
        feature_rows=None if len(which) == (features or 0) else which,
        features=features,
        target_positions=found_targets.positions,
        target_labels=found_targets.labels,
        targets=int((found_targets.labels != IGNORE_INDEX).sum()),
        padding="none" if bool(mask.all()) else layout.side,
        options=options,
        segments=moved,
        source=source,
    )


def _packed_rows(layout: _Layout) -> PackedRows:
    """What keeps the samples of packed rows apart."""
    batch, longest = layout.shape
    samples = torch.full((batch, longest), len(layout.lengths))
    starts = {0, batch * longest}
    for number, (length, (row, start)) in enumerate(zip(layout.lengths, layout.places, strict=True)):
        samples[row, start : start + length] = number
        starts |= {row * longest, row * longest + start, row * longest + start + length}
    bounds = torch.tensor(sorted(starts), dtype=torch.int32)
    return PackedRows(
        samples=samples,
        bounds=bounds,
        longest=int(bounds.diff().max()) if len(bounds) > 1 else 0,
        rows=tuple(place.row for place in layout.places),
        positions=len(layout.lengths) * (max(layout.lengths, default=0) - 1),
    )

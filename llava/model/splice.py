"""Splicing image features into the embedded text, and saying where everything lies (seam 2).

Corresponds to `prepare_inputs_labels_for_multimodal` of upstream's `llava_arch.py`; the segments follow the rules of
Dynamic-LLaVA (section 3.5 of its fixtures: answer = everything after the last ignored label).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.segments import MultimodalInputs, Segments, Span, row_segments, shifted


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


@dataclass
class _Row:
    embeds: Tensor  # (L_row, D)
    labels: Tensor  # (L_row,)
    segments: Segments


def _check_image_count(rows: Sequence[Tensor], available: int) -> None:
    """Every image token takes one image; a row without any takes its dummy image."""
    per_row = [int((ids == IMAGE_TOKEN_INDEX).sum()) for ids in rows]
    needed = sum(max(1, count) for count in per_row)
    if needed != available:
        raise ValueError(
            f"the batch needs {needed} images (image tokens per row: {per_row}; a row without any takes one dummy "
            f"image), but {available} were given. Pass one image per <image>, in row order."
        )


def answer_start(labels: Tensor) -> int:
    """Where the last answer of a row begins: behind its last ignored label; `labels` is (L_row,)."""
    ignored = (labels == IGNORE_INDEX).nonzero().flatten()
    return int(ignored[-1]) + 1 if len(ignored) else 0


def _splice_row(ids: Tensor, labels: Tensor, text: Tensor, images: Sequence[Tensor], options: SpliceOptions) -> _Row:
    """Put the images of one row where its image tokens stand.

    Args:
        ids: (T_row,) with image tokens.
        labels: (T_row,).
        text: (T_row - images, D) embeddings of the ordinary tokens.
        images: one (P_i, D) per image token, or the single dummy of a row without image token.
        options: lengths, sides and marker.
    """
    places = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    if not places:
        # The empty slice keeps tower and projector in the graph with zero weight: every rank runs the same modules.
        embeds = torch.cat([text, images[0][:0].to(text.dtype)])
        segments = row_segments([], len(labels), answer_start(labels), ids.tolist(), options.user_marker)
        return _Row(embeds, labels, segments)
    embed_parts: list[Tensor] = []
    label_parts: list[Tensor] = []
    spans: list[Span] = []
    start, length = 0, 0
    for number, place in enumerate(places):
        features = images[number].to(text.dtype)  # (P_i, D)
        embed_parts += [text[start - number : place - number], features]
        label_parts += [labels[start:place], labels.new_full((len(features),), IGNORE_INDEX)]
        length += place - start
        spans.append(Span(length, length + len(features)))
        length += len(features)
        start = place + 1
    embed_parts.append(text[start - len(places) :])
    label_parts.append(labels[start:])
    row_labels = torch.cat(label_parts)
    after = ids[start:].tolist()
    segments = row_segments(spans, len(row_labels), answer_start(row_labels), after, options.user_marker)
    return _Row(torch.cat(embed_parts), row_labels, segments)


def _pad(rows: list[_Row], padding_side: str, limits: list[int]) -> MultimodalInputs:
    """Stack rows of different length; embeddings are padded by 0, labels by -100."""
    longest, batch = max(limits), len(rows)
    width, device = rows[0].embeds.shape[-1], rows[0].embeds.device
    labels = rows[0].labels.new_full((batch, longest), IGNORE_INDEX)
    mask = torch.zeros(batch, longest, dtype=torch.bool, device=device)
    positions = torch.zeros(batch, longest, dtype=torch.long, device=device)
    embeds, segments = [], []
    for index, (row, length) in enumerate(zip(rows, limits, strict=True)):
        offset = longest - length if padding_side == "left" else 0
        padding = row.embeds.new_zeros(longest - length, width)
        kept = row.embeds[:length]
        embeds.append(torch.cat([padding, kept] if padding_side == "left" else [kept, padding]))
        labels[index, offset : offset + length] = row.labels[:length]
        mask[index, offset : offset + length] = True
        positions[index, offset : offset + length] = torch.arange(length, device=device)
        segments.append(shifted(row.segments, length, offset))
    return MultimodalInputs(torch.stack(embeds), labels, mask, positions, segments)  # embeds (B, L, D)


def splice(
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    images: Sequence[Tensor] | None,
    embed_tokens: nn.Module,
    options: SpliceOptions,
) -> MultimodalInputs:
    """Replace every image token by the features of the next image and pad the batch again.

    Args:
        input_ids: (B, T) with `IMAGE_TOKEN_INDEX` at images; padded on any side.
        labels: (B, T) or None (inference: everything counts as ignored).
        attention_mask: (B, T), zero at padding, or None.
        images: features (P_i, D), consumed in row order, one per image token; a row without image token consumes one
            and adds nothing. None for a batch that never had images.
        embed_tokens: embedding table of the language model.
        options: lengths, sides and marker.

    Returns:
        The batch; `labels` is None where None was given.

    Raises:
        ValueError: more or fewer images than the rows need, or image tokens without any image.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    ids = [row[keep] for row, keep in zip(input_ids, valid, strict=True)]
    targets = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
    row_labels = [row[keep] for row, keep in zip(targets, valid, strict=True)]
    if images is None:
        missing = [index for index, row in enumerate(ids) if bool((row == IMAGE_TOKEN_INDEX).any())]
        if missing:
            raise ValueError(f"rows {missing} hold <image> tokens, but no images were passed")
    else:
        _check_image_count(ids, len(images))

    text_ids = torch.cat([row[row != IMAGE_TOKEN_INDEX] for row in ids])
    text = embed_tokens(text_ids).split([int((row != IMAGE_TOKEN_INDEX).sum()) for row in ids])
    rows: list[_Row] = []
    used = 0
    for row_ids, row_label, row_text in zip(ids, row_labels, text, strict=True):
        count = max(1, int((row_ids == IMAGE_TOKEN_INDEX).sum()))
        mine = [row_text[:0]] if images is None else images[used : used + count]
        used += count
        rows.append(_splice_row(row_ids, row_label, row_text, mine, options))
    limit = options.max_length
    limits = [len(row.labels) if limit is None else min(len(row.labels), limit) for row in rows]
    inputs = _pad(rows, options.padding_side, limits)
    if labels is None:
        inputs.labels = None
    return inputs


def count_targets(input_ids: Tensor, labels: Tensor, image_lengths: Sequence[int], max_length: int | None) -> Tensor:
    """Number of positions that carry loss after splicing and truncation, without building embeddings.

    Args:
        input_ids: (B, T) with image tokens, padded on the right.
        labels: (B, T).
        image_lengths: sequence positions that each image takes, in row order; a row without image token has one
            entry, its dummy image. Empty for a batch that never had images.
        max_length: as in `SpliceOptions`; None for a batch that never had images, which is not cut.

    Returns:
        int64 scalar; the first position of a row is never a target, since nothing predicts it.
    """
    is_image = input_ids == IMAGE_TOKEN_INDEX
    extra = torch.zeros_like(input_ids)  # (B, T) positions that an image takes beside the one of its token
    used = 0
    for row, here in enumerate(is_image):
        count = int(here.sum())
        extra[row, here] = torch.tensor(image_lengths[used : used + count], device=extra.device, dtype=extra.dtype) - 1
        used += max(1, count)
    position = torch.arange(input_ids.shape[1], device=input_ids.device) + extra.cumsum(dim=1) - extra
    is_target = (labels != IGNORE_INDEX) & (position > 0)
    if max_length is not None:
        is_target &= position < max_length
    return is_target.sum()

"""Upstream's splicing of images into text, and where the parts of each sample are in it.

Upstream's own code splices. It is given the number of each token in place of its label; what comes back says where
every token went, whatever the size of the images, the side of the padding and the limit of the length are.

Shape letters: B batch, T length of the token ids, L length of the spliced sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.segments import Segments, Span, row_segments, shifted

IGNORED, IMAGE = -100, -200
"""Upstream's label without a target, and its token id of an image."""


@dataclass(frozen=True)
class SplicedInputs:
    """A batch as upstream's `forward` takes it.

    Attributes:
        inputs_embeds: (B, L, D).
        position_ids: (B, L) int64, or None.
        attention_mask: (B, L), zero at padding, or None.
        labels: (B, L) int64, or None.
        segments: the parts of each sample.
    """

    inputs_embeds: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    segments: list[Segments]


def splice(
    model: Any,
    ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    images: Any,
    image_sizes: Any,
) -> SplicedInputs:
    """Splice and say where the parts lie; the arguments are those of upstream's `forward`.

    Raises:
        ValueError: a sample has several images, or image tokens come without images.
    """
    tokens = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()  # (B, T)
    counts = ((ids == IMAGE) & tokens).sum(dim=1).tolist()
    if max(counts) > 1:
        raise ValueError(
            f"the samples of this batch have {counts} images; --dynamic is carried by moe_patch for at most one image "
            "per sample, as in the original; train and run such data in llava-extensions"
        )
    if images is None and max(counts):
        raise ValueError(f"the samples of this batch have {counts} image tokens, but no images were passed")
    numbers = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if images is None:
        embeds, places, mask = model.get_model().embed_tokens(ids), numbers.masked_fill(~tokens, IGNORED), tokens
    else:
        _, position_ids, mask, _, embeds, places = model.prepare_inputs_labels_for_multimodal(
            ids, position_ids, tokens, None, numbers, images, image_sizes
        )
        if embeds is None:  # upstream splices nothing into a row of one token
            embeds, places, mask = model.get_model().embed_tokens(ids), numbers, tokens
    text = places != IGNORED  # (B, L)
    spliced = None if labels is None else labels.gather(1, places.clamp(min=0)).masked_fill(~text, IGNORED)
    marker = tuple(getattr(model.config, "user_marker_ids", None) or ())
    targets = torch.full_like(ids, IGNORED) if labels is None else labels
    segments = [
        _segments(ids[row][tokens[row]], targets[row][tokens[row]], text[row], mask[row].bool(), marker)
        for row in range(len(ids))
    ]
    given = None if attention_mask is None and bool(mask.all()) else mask
    return SplicedInputs(embeds, position_ids, given, spliced, segments)


def _segments(ids: Tensor, labels: Tensor, text: Tensor, real: Tensor, marker: Sequence[int]) -> Segments:
    """The parts of one row.

    Args:
        ids: (T,) tokens without padding.
        labels: (T,).
        text: (L,) bool, True where a token went.
        real: (L,) bool, False at padding.
        marker: token ids that open a user turn.
    """
    limit = int(real.sum())
    offset = int(real.to(torch.uint8).argmax()) if limit else 0  # of padding on the left
    ignored = ((labels == IGNORED) | (ids == IMAGE)).nonzero().flatten()
    answer = int(ignored[-1]) + 1 if len(ignored) else 0
    places = (ids == IMAGE).nonzero().flatten().tolist()
    if not places:
        return shifted(row_segments([], len(ids), answer, ids.tolist(), marker), limit, offset)
    start, patches = places[0], int((real & ~text).sum())  # of an image that was cut, those that are left
    image, length = Span(start, start + patches), len(ids) - 1 + patches
    answer = answer if answer <= start else answer - 1 + patches
    return shifted(row_segments([image], length, answer, ids[start + 1 :].tolist(), marker), limit, offset)


def user_marker_ids(tokenizer: Any) -> list[int]:
    """Token ids of `USER:`, which opens a later turn in the v1 templates, as they stand behind an answer."""
    before = f"USER: a ASSISTANT: b{tokenizer.eos_token}"
    head, ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, f"{before}USER:"))
    shared = next((n for n, (one, other) in enumerate(zip(ids, head, strict=False)) if one != other), len(head))
    return list(ids[shared:])

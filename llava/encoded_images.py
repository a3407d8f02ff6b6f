"""The images of a batch between the vision tower and the text, as an extension may see and change them (seam 2).

In place of `encode_images` of upstream's `llava_arch.py` where an extension asks: the features of the tower, where each
of them will be in its image, and what the first and the last block of the tower attend to. Nothing is projected before
it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LINE_END = -1
"""In place of the number of a feature: the learned vector behind a line of tiles."""


@dataclass
class EncodedImages:
    """The images of a batch.

    Attributes:
        pixels: (N, 3, height, width), all tiles of all images.
        tiles: of each image.
        tower_features: (N, P, D_vision).
        sources: for each image (P_i,) int64: which row of the flattened (N P, D_vision) is at each of its positions, or
            `LINE_END`.
        tower: that made the features, a `VisionTower`.
        block_inputs: (N, P, D_vision), with the class token if there is one, what entered these blocks of the tower.
        projector: (..., D_vision) to (..., D).
        newline: (D,), or None if no line has an end.
        layouts: for each image its tiles across and down, and its width and height in pixels; None: one tile, or tiles
            without a layout.
        texts: gives for each image the (T,) int64 ids of its row behind the last image, without padding.
        features: for each image (P_i, D), set by an extension; None: those of all positions.
        notes: for each image, what extensions have to say of it later, by their name.
    """

    pixels: Tensor
    tiles: tuple[int, ...]
    tower_features: Tensor
    sources: list[Tensor]
    tower: Any
    block_inputs: dict[int, Tensor]
    projector: Callable[[Tensor], Tensor]
    newline: Tensor | None
    layouts: list[tuple[tuple[int, int], tuple[int, int]] | None]
    texts: Callable[[], list[Tensor]]
    features: list[Tensor] | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)

    def finished(self) -> list[Tensor]:
        """(P_i, D) of each image: what an extension has set, or all positions."""
        if self.features is None:
            projected = self.projector(self.tower_features).flatten(0, 1)  # (N P, D)
            self.features = [self.placed(source, projected[source.clamp(min=0)]) for source in self.sources]
        return self.features

    def placed(self, source: Tensor, projected: Tensor) -> Tensor:
        """`projected` (P_i, D) with the line ends of `source` (P_i,) put in."""
        if self.newline is None:
            return projected
        return torch.where((source == LINE_END)[:, None], self.newline.to(projected), projected)

    def attention_received(self, block: int) -> Tensor:
        """(N, patches) float32: what each patch receives from the class token, mean over the heads.

        Without a class token, as in SigLIP, it is the mean over all queries.

        Args:
            block: that has run, from 0; -1 is the last of them.
        """
        queries, keys = self._queries_and_keys(block)
        has_class = self.tower.shape.class_token
        if has_class:
            queries = queries[:, :, :1]
        weights = (queries.float() @ keys.float().transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)
        received = weights.mean(dim=(1, 2))  # (N, P)
        return received[:, 1:] if has_class else received

    def keys(self, block: int) -> Tensor:
        """(N, patches, C) float32: keys of a block, mean over the heads."""
        _, keys = self._queries_and_keys(block)
        mean = keys.float().mean(dim=1)  # (N, P, C)
        return mean[:, 1:] if self.tower.shape.class_token else mean

    def _queries_and_keys(self, block: int) -> tuple[Tensor, Tensor]:
        """(N, H, P, C) each, the class token first if there is one."""
        number = block % self.tower.num_blocks
        part = self.tower.blocks(self.tower.loaded())[number]
        with torch.no_grad():
            return self.tower.queries_and_keys(part, self.block_inputs[number])


def texts_behind_images(input_ids: Tensor, attention_mask: Tensor | None, image_token: int) -> list[Tensor]:
    """For each image (T,) ids of its row behind the row's last image.

    A row without images has one that is not shown, with all ids of the row.

    Args:
        input_ids: (B, T) with image tokens.
        attention_mask: (B, T), zero at padding, or None.
        image_token: the id that stands for an image.
    """
    found: list[Tensor] = []
    rows: Sequence[Tensor] = (
        input_ids
        if attention_mask is None
        else [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    )
    for ids in rows:
        places = (ids == image_token).nonzero().flatten().tolist()
        text = ids[places[-1] + 1 :] if places else ids
        found += [text] * max(1, len(places))
    return found

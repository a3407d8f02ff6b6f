"""NEFTune: uniform noise on the embeddings of text while training (https://arxiv.org/abs/2310.05914).

The noise of a sample is scaled by the number of its noised positions, so that padding, images and the other samples of
a packed row do not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.segments import MultimodalInputs, PackedRows


def with_noise(embeds: Tensor, noised: Tensor, alpha: float, packed: PackedRows | None = None) -> Tensor:
    """Embeddings with noise, uniform between -m and m with m = alpha / sqrt(T D) for T noised positions of a sample.

    Args:
        embeds: (B, L, D), any floating dtype.
        noised: (B, L) bool, the positions of text.
        alpha: of `--neftune_noise_alpha`.
        packed: where the samples are; None: every row is one.

    Returns:
        (B, L, D) in the dtype of `embeds`.
    """
    tokens = noised.sum(dim=1) if packed is None else packed.sums(noised.long())  # (B,), or of each sample
    count = tokens.clamp(min=1) * embeds.shape[-1]
    largest = (alpha / count.float().sqrt()).to(embeds.dtype)  # float16 does not have the counts of long rows
    scale = largest[:, None, None] if packed is None else packed.spread(largest)[..., None]  # (B, 1 or L, 1)
    noise = torch.zeros_like(embeds).uniform_(-1, 1) * scale  # (B, L, D)
    return embeds + noise * noised[:, :, None]


def text_positions(inputs: MultimodalInputs) -> Tensor:
    """(B, L) bool: the positions of a spliced batch that are neither padding nor part of an image."""
    shape, device = inputs.inputs_embeds.shape[:2], inputs.inputs_embeds.device
    mask = inputs.attention_mask
    found = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool().clone()
    rows = range(len(inputs.segments)) if inputs.packed is None else inputs.packed.rows
    for row, segments in zip(rows, inputs.segments, strict=True):
        for image in segments.images:
            found[row, image.start : image.end] = False
    return found

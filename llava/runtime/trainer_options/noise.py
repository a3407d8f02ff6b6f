"""NEFTune: uniform noise on the embeddings of text while training (https://arxiv.org/abs/2310.05914).

The noise of a row is scaled by the number of its noised positions, so that padding and images do not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.segments import MultimodalInputs


def with_noise(embeds: Tensor, noised: Tensor, alpha: float) -> Tensor:
    """Embeddings with noise, uniform between -m and m with m = alpha / sqrt(T D) for T noised positions of a row.

    Args:
        embeds: (B, L, D), any floating dtype.
        noised: (B, L) bool, the positions of text.
        alpha: of `--neftune_noise_alpha`.

    Returns:
        (B, L, D) in the dtype of `embeds`.
    """
    count = noised.sum(dim=1).clamp(min=1) * embeds.shape[-1]  # (B,)
    largest = (alpha / count.float().sqrt()).to(embeds.dtype)  # (B,); float16 does not have the counts of long rows
    noise = torch.zeros_like(embeds).uniform_(-1, 1) * largest[:, None, None]  # (B, L, D)
    return embeds + noise * noised[:, :, None]


def text_positions(inputs: MultimodalInputs) -> Tensor:
    """(B, L) bool: the positions of a spliced batch that are neither padding nor part of an image."""
    shape, device = inputs.inputs_embeds.shape[:2], inputs.inputs_embeds.device
    mask = inputs.attention_mask
    found = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool().clone()
    for row, segments in enumerate(inputs.segments):
        for image in segments.images:
            found[row, image.start : image.end] = False
    return found

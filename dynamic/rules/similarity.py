"""What several rules compute of the features of one image: cosine similarity, and scores brought to the range 0 to 1.

Shape letters: n tokens that are judged, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def unit(features: Tensor) -> Tensor:
    """Features (n, D) as float32 vectors of length 1; a vector of zeros stays one."""
    return F.normalize(features.float(), dim=-1)


def cosine(features: Tensor, *, centered: bool = False) -> Tensor:
    """Cosine similarity (n, n) float32 of features (n, D).

    Args:
        features: of one image.
        centered: subtract their mean first (Cen-Prune), which takes away what all tokens have in common.
    """
    features = features.float()
    if centered:
        features = features - features.mean(dim=0)
    vectors = unit(features)  # (n, D)
    return vectors @ vectors.T  # (n, n)


def min_max(scores: Tensor) -> Tensor:
    """Scores (n,) scaled so that the least is 0 and the largest 1; all ones where they do not differ."""
    scores = scores.float()
    least, largest = scores.aminmax()
    if bool(least == largest):
        return scores.new_ones(scores.shape)
    return (scores - least) / (largest - least)


def distinctiveness(similarity: Tensor) -> Tensor:
    """How little each token resembles all others, (n,) from 0 to 1, of centered similarities (n, n) (Cen-Prune)."""
    return min_max(-similarity.mean(dim=1))

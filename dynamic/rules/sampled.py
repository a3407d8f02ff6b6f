"""Tokens drawn at random: what every other rule has to beat (Wen et al., arXiv 2502.11501).

Shape letters: n tokens that are judged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection


@register
@dataclass(frozen=True)
class RandomRule(ImageRule):
    """`keep` of the n tokens, each subset equally likely.

    The draw depends on the seed, n, and the pixels of the image in the dtype of the model, so it is the same in any
    batch and row.
    A smaller budget keeps a part of what a larger one keeps. Report several seeds.

    Attributes:
        seed: another one draws other tokens.
    """

    name: ClassVar[str] = "random"
    reference: ClassVar[str] = "Wen et al., Token Pruning in Multimodal LLMs, arXiv 2502.11501 (as a baseline)"
    place: ClassVar[str] = "features"

    seed: int = 0

    def select(self, image: ImageView, keep: int) -> Selection:
        """The first `keep` of a random order."""
        text = f"{self.seed} {image.digest()}".encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        places = image.places
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(number))  # (n,)
        return Selection(order[:keep].sort().values.to(places.device))

"""CDPruner (Zhang et al., arXiv 2506.10967, section 3): tokens that are diverse given the question.

Shape letters: n tokens that are judged, D width of the language model, T tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dynamic.rules.rule import ImageRule, ImageView, register
from dynamic.rules.selection import Selection
from dynamic.rules.similarity import cosine, distinctiveness, min_max, unit
from llava.errors import FlagError

DEPENDENT = 1e-5
"""A token of which the chosen ones explain all but this share of its squared length adds no volume: float32 knows no
better. Duplicates come out at about 1e-6."""


@register
@dataclass(frozen=True)
class CDPrunerRule(ImageRule):
    """Greedy search for the most probable subset of a determinantal point process.

    Its kernel is diag(r) S diag(r): S the cosine similarity of projected features, r the relevance of each token to
    the question, scaled to 0 to 1 over the image. A subset is as good as its part of the kernel has volume.

    The paper measures relevance in CLIP: minus the cosine between patch and text, since patches of CLIP resemble a
    text less where they show what it says. Checkpoints of LLaVA contain neither CLIP's text tower nor its projection,
    so here relevance is, with the same sign, the mean cosine between projected features and the embeddings of the
    question's tokens. The paper's parameter theta is not in its published code, nor here.

    Attributes:
        sign: of the cosine; -1 as in the paper, 1 for what resembles the question.
        cen: Cen-Prune's change: S of features without their mean, and r times distinctiveness (`similarity.py`).
    """

    name: ClassVar[str] = "cdpruner"
    reference: ClassVar[str] = "Zhang et al., CDPruner: Maximizing Conditional Diversity, arXiv 2506.10967"
    place: ClassVar[str] = "features"
    modifiers: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cen": {"cen": True}}

    sign: int = -1
    cen: bool = False

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise FlagError(f"--reduce cdpruner: sign is {self.sign}; give -1 or 1")

    def select(self, image: ImageView, keep: int) -> Selection:
        """The greedy choice, by the pivots of a Cholesky factorization of S."""
        similarity = cosine(image.projected, centered=self.cen)  # (n, n)
        relevance = self._relevance(image.projected, image.question)  # (n,)
        if self.cen:
            relevance = relevance * distinctiveness(similarity)
        return Selection(most_probable(similarity, relevance, keep))

    def _relevance(self, projected: Tensor, question: Tensor) -> Tensor:
        """(n,) from 0 to 1; without any text all tokens are equally relevant."""
        if len(question) == 0:
            return projected.new_ones(len(projected), dtype=torch.float32)
        alike = unit(projected) @ unit(question).T  # (n, T)
        return min_max(self.sign * alike.mean(dim=1))


def most_probable(similarity: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Indices (keep,), each the one that multiplies the determinant of the chosen part of the kernel most.

    For the kernel diag(r) S diag(r) that factor is the squared relevance times what the chosen ones leave unexplained
    of the token in S, one minus its squared row of the Cholesky factor (Chen et al., arXiv 1709.05135). Once no token
    adds volume, the first ones are taken.

    Args:
        similarity: S (n, n), ones on its diagonal.
        relevance: r (n,).
        keep: at most n.
    """
    unexplained = similarity.diagonal().clone()  # (n,)
    factor = similarity.new_zeros(keep, len(relevance))  # (keep, n), rows of the Cholesky factor
    taken = torch.zeros_like(relevance, dtype=torch.bool)
    kept = torch.empty(keep, dtype=torch.long, device=similarity.device)
    for step in range(keep):
        gain = relevance.square() * unexplained
        pick = gain.masked_fill(taken, -torch.inf).argmax(dim=0, keepdim=True)  # (1,)
        # An index of one number would be waited for.
        rest = unexplained.index_select(0, pick)  # (1,)
        row = similarity.index_select(0, pick)[0] - factor[:step].T @ factor[:step].index_select(1, pick)[:, 0]  # (n,)
        # A token without volume of its own explains nothing that the others do not
        factor[step] = torch.where(rest > 0, row * rest.clamp(min=DEPENDENT).rsqrt(), torch.zeros_like(row))
        unexplained = unexplained - factor[step].square()
        unexplained = unexplained.where(unexplained > DEPENDENT, torch.zeros_like(unexplained))
        taken.index_fill_(0, pick, True)
        kept[step : step + 1] = pick
    return kept

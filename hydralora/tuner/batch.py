"""What the layers have to know about a forward pass when a router decides for whole sequences.

A layer sees hidden states only. The note of a pass says which tokens are padding, which belong to a prompt, where the
sequences of packed rows begin and whether the pass continues from a cache; or why it cannot say so. `passes.py` makes
the note of each call and brings it to the layers, `sequence.py` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Kept:
    """Weights of the prompts of a batch, for the tokens that come later.

    Attributes:
        weights: (B, 1, E) of the experts.
        routed: (B,) bool, the rows that this adapter has routed; None: all.
    """

    weights: Tensor
    routed: Tensor | None = None

    def rows(self, index: Tensor) -> Kept:
        """The rows `index` (B',), as a cache takes them when it is reordered."""
        index = index.to(self.weights.device)
        return Kept(self.weights[index], None if self.routed is None else self.routed[index])


Weights = dict[tuple[int, str], Kept]
"""By layer (its `id`) and adapter."""


@dataclass(frozen=True)
class BatchNote:
    """Note about one forward pass. Without any facts, all tokens of a row decide.

    Attributes:
        prompt: (B, T) bool, the tokens whose mean decides; None: all.
        shape: (B, T) of the pass's tokens; None: not known.
        starts: (B, T) int, the column in which the sequence of each token begins; None: every row is one sequence.
        continues: True for a pass that continues from a filled cache.
        weights: of the prompts that this pass began or continues; the layers fill it in.
        refusal: why nothing can be said about this pass; a layer that routes by sequence raises it.
        states: (B, S, D) of an encoder to which this pass attends; None: there is none.
        encoder: note about the tokens of `states`.
    """

    prompt: Tensor | None = None
    shape: tuple[int, int] | None = None
    starts: Tensor | None = None
    continues: bool = False
    weights: Weights = field(default_factory=dict)
    refusal: str | None = None
    states: Tensor | None = None
    encoder: BatchNote | None = None


def prompt_tokens(
    attention_mask: Tensor | None, labels: Tensor | None, starts: Tensor | None = None, shifted: bool = False
) -> Tensor | None:
    """Tokens before the first target, padding left out; all valid tokens without labels.

    Only tokens that are known before the answer may decide, or training would look ahead. A sequence that begins with
    a target is decided by its first valid token alone.

    Args:
        attention_mask: (B, T), zero at padding, or None.
        labels: (B, T), -100 where ignored, or None.
        starts: (B, T), the column in which the sequence of each token begins; None: every row is one sequence.
        shifted: the input is the labels moved by one, as in decoders of encoder-decoders: where the first target is
            asked for, the token is still known.

    Returns:
        (B, T) bool, or None if nothing is known.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        attention_mask = None
    if attention_mask is None and labels is None:
        return None
    known = attention_mask if attention_mask is not None else torch.ones_like(labels)
    valid = known != 0  # (B, T)
    if labels is None or labels.shape != valid.shape:
        return valid
    targets = labels != IGNORED
    before = _earlier(targets, starts) == 0
    if not shifted:
        before = before & ~targets
    first = _earlier(valid, starts) == 0
    return valid & (before | first)


def _earlier(flags: Tensor, starts: Tensor | None) -> Tensor:
    """How many of `flags` (B, T) stand before each token in its own sequence, (B, T)."""
    numbers = flags.long()
    before = numbers.cumsum(dim=1) - numbers
    return before if starts is None else before - before.gather(1, starts)

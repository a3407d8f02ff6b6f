"""What the layers have to know about the batch under way when a router decides for whole sequences.

A layer sees hidden states only. A hook on the model notes which tokens are padding, which belong to the prompt and
whether a call continues a sequence from a cache. The note stays until the next call, so that recomputation under
gradient checkpointing finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100


@dataclass
class BatchNote:
    """Note about one call of the model.

    Attributes:
        prompt: (B, T) bool, the tokens whose mean decides; None: all.
        continues: True for a call that goes on from a filled cache.
    """

    prompt: Tensor | None = None
    continues: bool = False

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a causal language model (`with_kwargs=True`)."""
        cache = kwargs.get("past_key_values")
        self.continues = cache is not None and cache.get_seq_length() > 0
        self.prompt = None if self.continues else prompt_tokens(kwargs.get("attention_mask"), kwargs.get("labels"))


def prompt_tokens(attention_mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Tokens before the first target, padding left out; all valid tokens without labels.

    Only tokens that are known before the answer may decide, or training would look ahead. A row that begins with a
    target is decided by its first valid token alone.

    Args:
        attention_mask: (B, T), zero at padding, or None.
        labels: (B, T), -100 where ignored, or None.

    Returns:
        (B, T) bool, or None if nothing is known.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        attention_mask = None
    if attention_mask is None and labels is None:
        return None
    known = attention_mask if attention_mask is not None else torch.ones_like(labels)
    valid = known.bool()  # (B, T)
    if labels is None or labels.shape != valid.shape:
        return valid
    before = (labels != IGNORED).long().cumsum(dim=1) == 0
    first = valid & (valid.long().cumsum(dim=1) == 1)
    return (valid & before) | first

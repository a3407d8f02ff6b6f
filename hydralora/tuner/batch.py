"""What the layers have to know about a forward pass when a router decides for whole sequences.

A layer sees hidden states only. The note of a pass says which tokens are padding, which belong to the prompt and
whether the pass continues a sequence from a cache. It never changes; `passes.py` brings it to the layers. The weights
of a prompt travel with its cache, so that several prompts can be under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
CACHE_ATTRIBUTE = "hydralora_sequence_weights"
"""Where a cache holds the weights of its prompt; a copy of the cache copies them."""


@dataclass(frozen=True)
class BatchNote:
    """Note about one forward pass of the model. Without any facts, all tokens of a sequence decide.

    Attributes:
        prompt: (B, T) bool, the tokens whose mean decides; None: all.
        shape: (B, T) of the pass's tokens; None: not known.
        continues: True for a pass that continues from a filled cache.
        weights: (B, 1, E) of the experts by layer (its `id`) and adapter, of the prompts that this pass began or
            continues; the layers fill it in.
    """

    prompt: Tensor | None = None
    shape: tuple[int, int] | None = None
    continues: bool = False
    weights: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def keep_on(self, cache: Any) -> None:
        """Let a cache carry the weights of its prompt; None: there is no cache."""
        if cache is not None:
            setattr(cache, CACHE_ATTRIBUTE, self.weights)


def note_of_pass(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any, prompt_length: int | None = None
) -> BatchNote:
    """The note of a forward pass of a causal language model.

    Args:
        args: positional arguments of `forward`.
        kwargs: its other arguments.
        cache: the one among them, or None.
        prompt_length: number of tokens from the start of a row that may decide; None: all of them.
    """
    shape = token_shape(args, kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return BatchNote(shape=shape, continues=True, weights=getattr(cache, CACHE_ATTRIBUTE, {}))
    mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if shape is not None and labels is None and (mask is None or mask.ndim != 2):
        mask = torch.ones(shape, dtype=torch.bool)
    prompt = prompt_tokens(mask, labels)
    if prompt is not None and prompt_length is not None:
        prompt = prompt & (torch.arange(prompt.shape[1], device=prompt.device) < prompt_length)
    note = BatchNote(prompt, shape)
    note.keep_on(cache)
    return note


def token_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, T) of ids (B, T) or embeddings (B, T, D), the first argument or one of the usual names; None without."""
    for value in (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))):
        if isinstance(value, Tensor) and value.ndim == (3 if value.is_floating_point() else 2):
            return value.shape[0], value.shape[1]
    return None


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

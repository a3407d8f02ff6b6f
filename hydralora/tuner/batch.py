"""What the layers have to know about the batch under way when a router decides for whole sequences.

A layer sees hidden states only. Hooks on the model note which tokens are padding, which belong to the prompt and
whether a call continues a sequence from a cache. The note stays until the next call, so that recomputation under
gradient checkpointing finds it; the weights of a prompt travel with its cache, so that several can be under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100
CACHE_ATTRIBUTE = "hydralora_sequence_weights"
"""Where a cache holds the weights of its prompt; a copy of the cache copies them."""


@dataclass
class BatchNote:
    """Note about one call of the model.

    Attributes:
        prompt: (B, T) bool, the tokens whose mean decides; None: all.
        shape: (B, T) of the call's tokens; None: not known.
        continues: True for a call that goes on from a filled cache.
        weights: (B, 1, E) of the experts by layer (its `id`) and adapter, of the prompts that this call began or
            continues.
    """

    prompt: Tensor | None = None
    shape: tuple[int, int] | None = None
    continues: bool = False
    weights: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _prompt_length: int | None = None
    _in_call: bool = False

    @contextmanager
    def one_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Surrounds a forward pass or a whole generation: what is longer than its input has been generated.

        Args:
            args: positional arguments of `forward` or `generate`.
            kwargs: its other arguments.
        """
        shape = _token_shape(args, kwargs)
        self._in_call, self._prompt_length = True, None if shape is None else shape[1]
        try:
            yield
        finally:
            self._in_call, self._prompt_length = False, None

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a causal language model (`with_kwargs=True`)."""
        cache, self.shape = kwargs.get("past_key_values"), _token_shape(args, kwargs)
        self.continues = cache is not None and cache.get_seq_length() > 0
        if self.continues:
            self.prompt, self.weights = None, getattr(cache, CACHE_ATTRIBUTE, {})
            return
        self.weights = {}
        self._keep(cache)
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if self.shape is not None and labels is None and (mask is None or mask.ndim != 2):
            mask = torch.ones(self.shape, dtype=torch.bool)
        self.prompt = prompt_tokens(mask, labels)
        if self._in_call and self.prompt is not None:  # without a cache, each step of a generation comes by here
            self._prompt_length = self._prompt_length or self.prompt.shape[1]
            self.prompt = self.prompt.clone()
            self.prompt[:, self._prompt_length :] = False

    def hand_over(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model: a cache that it made itself gets the weights too."""
        self._keep(getattr(output, "past_key_values", None))

    def _keep(self, cache: Any) -> None:
        if cache is not None:
            setattr(cache, CACHE_ATTRIBUTE, self.weights)


def _token_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
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

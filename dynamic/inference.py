"""Passes without a loss: tokens are really dropped, from the sparse layer on (paper, sections 3.2 and 3.4).

Corresponds to the inference branches of `DynamicLlamaModel.forward` in `dynamic_modeling_llama.py`. A pass over prompts
shortens the sequence; a pass on a filled cache computes every new token, and only decides which of them are remembered.
Each sample is treated as if it were alone: padding is dropped too, and what is left of it is masked.

Shape letters: B batch, L sequence length, D width, S cached positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynamic.cache import SparseCache
from dynamic.config import SparseConfig
from dynamic.decisions import later_decision, prompt_decision
from dynamic.inspection import PromptDecision, StageDecision, logs_of
from dynamic.model import predictors
from dynamic.sequence import State, shorten, valid_positions, with_mask


def drops_tokens(config: SparseConfig) -> bool:
    """False if inference is that of the dense model: every image token is kept and no text is judged."""
    drops_images = config.use_vision_predictor and config.vision_keep_rate < 1
    return drops_images or config.judges_output_text or config.judges_instruction


def make_cache(model: nn.Module, config: SparseConfig) -> SparseCache | None:
    """An empty cache for `model`; None if nothing is ever dropped and any cache will do."""
    if not drops_tokens(config):
        return None
    host: Any = model
    return SparseCache(len(host.get_decoder().layers), config.sparse_layer)


def drop_tokens(model: nn.Module, config: SparseConfig, state: State) -> State:
    """What enters the sparse layer: a shorter sequence for prompts, the same tokens for later passes.

    Args:
        model: the causal language model with its predictors.
        config: of the predictors.
        state: before layer `config.sparse_layer`.

    Raises:
        ValueError: the cache is not a `SparseCache`, or a prompt comes on top of a filled one.
    """
    if not drops_tokens(config):
        return state
    cache = _checked_cache(state)
    valid = valid_positions(state)
    if cache is not None and cache.is_filled:
        return _later_pass(model, config, state, cache, valid)
    keep = valid
    if state.segments is not None:
        keep = prompt_decision(config, predictors(model), state.hidden_states, state.segments, valid)
        for log in logs_of(model):
            decision = PromptDecision(keep.cpu(), state.segments)
            log.add_prompts(decision, [StageDecision(config.sparse_layer, decision)])
    if not torch.equal(keep, valid):
        state = shorten(model, config.sparse_layer, state, keep, valid)
        keep = valid_positions(state)
    if cache is not None:
        cache.plan_pass(keep, valid)
    return state


def store_all(state: State) -> None:
    """Let a cache that came with a pass with a loss, where nothing is dropped, hold every token."""
    if isinstance(state.cache, SparseCache):
        valid = valid_positions(state)
        state.cache.plan_pass(valid, valid)


def _checked_cache(state: State) -> SparseCache | None:
    cache = state.cache
    if cache is None:
        return None
    if not isinstance(cache, SparseCache):
        raise ValueError(
            f"'dynamic' drops tokens and needs its own cache, but got a {type(cache).__name__}; pass none and let the "
            "model make one, or pass `model.extensions.make_cache(model)`"
        )
    if cache.is_filled and state.segments is not None:
        raise ValueError(
            f"a prompt begins a sequence, but the cache holds {int(cache.ledger.seen.max())} tokens already; pass an "
            "empty cache, or continue with `model(input_ids=..., cache=cache)`"
        )
    return cache


def _later_pass(model: nn.Module, config: SparseConfig, state: State, cache: SparseCache, valid: Tensor) -> State:
    """Tokens on top of a filled cache: one is generated text, several are the next turn of the user.

    All of them are computed and see the cache and each other; the sparse layers store those that are kept.

    Args:
        model: the causal language model.
        config: of the predictors.
        state: of L new positions.
        cache: filled.
        valid: (B, L) bool, False at padding.
    """
    keep = later_decision(predictors(model), state.hidden_states, valid)
    for log in logs_of(model):
        log.add_tokens(keep)
        if log.wants_cache:
            log.add_cache(cache.report())
    visible = cache.plan_pass(keep, valid)
    if valid.shape[1] > 1:
        return with_mask(model, config.sparse_layer, state, visible)
    # A single token: free slots are always masked, so nothing is asked of the device to find out.
    state = with_mask(model, config.sparse_layer, state, visible, always=True)
    # Behind the slots as behind stored positions: what others read of the mask is which new tokens are padding.
    return replace(state, attention_mask=torch.cat([visible, valid], dim=1))

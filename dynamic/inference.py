"""Passes without a loss: tokens are really dropped, from the sparse layer on (paper, sections 3.2 and 3.4).

Corresponds to the inference branches of `DynamicLlamaModel.forward` in `dynamic_modeling_llama.py`. A pass over prompts
shortens the sequence; a pass on a filled cache computes every new token, and only decides which of them are remembered.
Each sample is treated as if it were alone: padding is dropped too, and what is left of it is masked.

Shape letters: B batch, L sequence length, D width, S cached positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynamic.cache import SparseCache
from dynamic.config import SparseConfig
from dynamic.inspection import PromptDecision, logs_of
from dynamic.layer import hard_keep, kept_count, top_keep
from dynamic.model import Predictors, predictors
from dynamic.sequence import State, shorten, valid_positions, with_mask
from dynamic.spans import Parts, Range


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
            log.prompts.append(PromptDecision(keep.cpu(), state.segments))
    if not torch.equal(keep, valid):
        state = shorten(model, config, state, keep, valid)
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


def _judge(predictor: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (..., 2) on the device of `tokens`; the predictor may lie elsewhere and compute in another dtype."""
    weight = next(predictor.parameters())
    return predictor(tokens.to(weight.device, weight.dtype)).to(tokens.device)


def prompt_decision(
    config: SparseConfig, judges: Predictors, hidden: Tensor, segments: Sequence[Parts], valid: Tensor
) -> Tensor:
    """Which positions of a batch of prompts stay, (B, L) bool; of each sample the last one always does.

    Of each image the share `vision_keep_rate` with the highest probability stays, and the last token if it is the last
    of the prompt. Of the last instruction, and of
    tokens that were generated before (generation without cache), those stay whose keep logit is the larger one.

    Args:
        config: of the predictors.
        judges: the predictors.
        hidden: (B, L, D) input of the sparse layer.
        segments: one per sample; what stands behind `answer.start` was generated.
        valid: (B, L) bool, False at padding.
    """
    keep = valid.clone()
    if judges.image is not None:
        _keep_best(judges.image, config.vision_keep_rate, hidden, segments, keep)
    if judges.instruct is not None:
        # The answer is generated from the last token of the instruction, so it is not asked about.
        instructions = [(start, end - 1) for start, end in (sample.last_instruct for sample in segments)]
        _keep_approved(judges.instruct, hidden, instructions, keep)
    if judges.output_text is not None:
        newest = _last_position(valid)
        generated = [(sample.answer[0], end) for sample, end in zip(segments, newest, strict=True)]
        _keep_approved(judges.output_text, hidden, generated, keep)
    # Generation starts from the last position, be it of an image.
    keep[torch.arange(len(valid), device=valid.device), _last_position(valid)] = valid.any(dim=1)
    return keep


def _keep_best(predictor: nn.Module, keep_rate: float, hidden: Tensor, segments: Sequence[Parts], keep: Tensor) -> None:
    """Clear the places of dropped image tokens in `keep`; images of one length are judged together."""
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, sample in enumerate(segments):
        for start, end in sample.images:
            by_length[end - start].append((row, start))
    for length, places in by_length.items():
        count = kept_count(length, keep_rate)
        if count == length:
            continue
        rows, starts = torch.tensor(places, device=hidden.device).T[..., None]  # (N, 1) each
        positions = starts + torch.arange(length, device=hidden.device)  # (N, n)
        best = top_keep(_judge(predictor, hidden[rows, positions]), count)  # (N, count)
        keep[rows, positions] = False
        keep[rows, starts + best] = True


def _keep_approved(predictor: nn.Module, hidden: Tensor, spans: Sequence[Range], keep: Tensor) -> None:
    """Clear the places in `keep` of those tokens of `spans`, one per sample, that the text predictor drops."""
    bounds = torch.tensor(spans, device=hidden.device)[..., None]  # (B, 2, 1)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    judged = keep & (places >= bounds[:, 0]) & (places < bounds[:, 1])  # (B, L)
    keep[judged] = hard_keep(_judge(predictor, hidden[judged]))


def _last_position(valid: Tensor) -> list[int]:
    """Index of the last position of each sample that is no padding."""
    return (valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(dim=1)).tolist()


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
    judges, keep = predictors(model), valid
    judge = judges.output_text if valid.shape[1] == 1 else judges.instruct
    if judge is not None:
        keep = valid & hard_keep(_judge(judge, state.hidden_states))  # (B, L)
        if valid.shape[1] > 1:  # the answer is generated from the last one
            rows = torch.arange(len(valid), device=valid.device)
            keep[rows, _last_position(valid)] = valid.any(dim=1)
    for log in logs_of(model):
        log.new_tokens.append(keep.cpu())
    state = with_mask(model, config, state, torch.cat([cache.stored(valid.device), valid], dim=1))
    cache.plan_pass(keep, valid)
    return state

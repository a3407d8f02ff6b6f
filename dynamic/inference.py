"""Passes without a loss: tokens are really dropped, from the sparse layer on (paper, sections 3.2 and 3.4).

Corresponds to the inference branches of `DynamicLlamaModel.forward` in `dynamic_modeling_llama.py`. A pass over prompts
shortens the sequence; a pass on a filled cache computes every new token, and only decides which of them are remembered.
Each sample is treated as if it were alone: padding is dropped too, and what is left of it is masked.

Shape letters: B batch, L sequence length, D width, K kept positions (the longest sample's), S cached positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from dynamic.cache import SparseCache
from dynamic.config import SparseConfig
from dynamic.inspection import PromptDecision, logs_of
from dynamic.layer import hard_keep, kept_count, top_keep
from dynamic.model import Predictors, predictors
from llava.extension import DecoderState, Segments, Span


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


def drop_tokens(model: nn.Module, config: SparseConfig, state: DecoderState) -> DecoderState:
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
    valid = _valid(state)
    if cache is not None and cache.is_filled:
        return _later_pass(model, config, state, cache, valid)
    keep = valid
    if state.segments is not None:
        keep = prompt_decision(config, predictors(model), state.hidden_states, state.segments, valid)
        for log in logs_of(model):
            log.prompts.append(PromptDecision(keep.cpu(), state.segments))
    if not torch.equal(keep, valid):
        state = shorten(model, config, state, keep, valid)
        keep = _valid(state)
    if cache is not None:
        cache.plan_pass(keep, valid)
    return state


def store_all(state: DecoderState) -> None:
    """Let a cache that came with a pass with a loss, where nothing is dropped, hold every token."""
    if isinstance(state.cache, SparseCache):
        valid = _valid(state)
        state.cache.plan_pass(valid, valid)


def _valid(state: DecoderState) -> Tensor:
    """(B, L) bool, False at padding."""
    batch, length, _ = state.hidden_states.shape
    if state.attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=state.hidden_states.device)
    return state.attention_mask[:, -length:].bool().to(state.hidden_states.device)


def _checked_cache(state: DecoderState) -> SparseCache | None:
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
            f"a prompt begins a sequence, but the cache holds {cache.get_seq_length()} positions already; pass an "
            "empty cache, or continue with `model(input_ids=..., past_key_values=cache)`"
        )
    return cache


def _judge(predictor: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (..., 2) on the device of `tokens`; the predictor may lie elsewhere and compute in another dtype."""
    weight = next(predictor.parameters())
    return predictor(tokens.to(weight.device, weight.dtype)).to(tokens.device)


def prompt_decision(
    config: SparseConfig, judges: Predictors, hidden: Tensor, segments: Sequence[Segments], valid: Tensor
) -> Tensor:
    """Which positions of a batch of prompts stay, (B, L) bool; of each sample the last one always does.

    Of each image the share `vision_keep_rate` with the highest probability stays. Of the last instruction, and of tokens
    that were generated before (generation without cache), those stay whose keep logit is the larger one.

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
        instructions = [Span(segment.last_instruct.start, segment.last_instruct.end - 1) for segment in segments]
        _keep_approved(judges.instruct, hidden, instructions, keep)
    if judges.output_text is not None:
        newest = _last_position(valid)
        generated = [Span(s.answer.start, end) for s, end in zip(segments, newest, strict=True)]
        _keep_approved(judges.output_text, hidden, generated, keep)
    return keep


def _keep_best(
    predictor: nn.Module, keep_rate: float, hidden: Tensor, segments: Sequence[Segments], keep: Tensor
) -> None:
    """Clear the places of dropped image tokens in `keep`; images of one length are judged together."""
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, segment in enumerate(segments):
        for span in segment.images:
            by_length[span.end - span.start].append((row, span.start))
    for length, places in by_length.items():
        count = kept_count(length, keep_rate)
        if count == length:
            continue
        rows, starts = torch.tensor(places, device=hidden.device).T[..., None]  # (G, 1) each, for G images
        positions = starts + torch.arange(length, device=hidden.device)  # (G, n)
        best = top_keep(_judge(predictor, hidden[rows, positions]), count)  # (G, count)
        keep[rows, positions] = False
        keep[rows, starts + best] = True


def _keep_approved(predictor: nn.Module, hidden: Tensor, spans: Sequence[Span], keep: Tensor) -> None:
    """Clear the places in `keep` of those tokens of `spans`, one per sample, that the text predictor drops."""
    bounds = torch.tensor(spans, device=hidden.device)[..., None]  # (B, 2, 1)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    judged = keep & (places >= bounds[:, 0]) & (places < bounds[:, 1])  # (B, L)
    keep[judged] = hard_keep(_judge(predictor, hidden[judged]))


def _last_position(valid: Tensor) -> list[int]:
    """Index of the last position of each sample that is no padding."""
    return (valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(dim=1)).tolist()


def shorten(model: nn.Module, config: SparseConfig, state: DecoderState, keep: Tensor, valid: Tensor) -> DecoderState:
    """The sequence of the kept positions, in their order, with everything that belongs to a position.

    Samples that keep fewer than others are padded on the side on which the batch was padded; a batch without padding is
    padded on the left, so that its last position stays that of the last token.

    Args:
        model: the causal language model.
        config: of the predictors.
        state: of L positions.
        keep: (B, L) bool.
        valid: (B, L) bool, False at padding.
    """
    counts = keep.sum(dim=1, keepdim=True)  # (B, 1)
    longest = int(counts.max())
    places = torch.arange(longest, device=keep.device)
    on_the_left = bool(valid[:, -1].all())
    if on_the_left:  # stable sorts leave kept positions in their order
        index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -longest:]  # (B, K)
        filled = places >= longest - counts
    else:
        index = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        filled = places < counts
    state = take_positions(state, index)
    if state.segments is not None:
        offsets = (longest - counts).flatten().tolist() if on_the_left else [0] * len(keep)
        before = torch.cat([keep.new_zeros(len(keep), 1), keep], dim=1).cumsum(dim=1).tolist()  # L + 1 each
        moved = [_move(*row) for row in zip(state.segments, before, offsets, strict=True)]
        state = replace(state, segments=moved)
    return _with_mask(model, config, state, filled)


def take_positions(state: DecoderState, index: Tensor) -> DecoderState:
    """Hidden states, positions and rotary embeddings of the positions `index` (B, K); masks are left as they are."""
    rows = torch.arange(len(index), device=index.device)[:, None]

    def take(x: Tensor) -> Tensor:  # (B or 1, L, ...) -> (B, K, ...)
        return x.to(index.device).expand(len(index), *x.shape[1:])[rows, index]

    cos, sin = state.position_embeddings
    return replace(
        state,
        hidden_states=take(state.hidden_states),
        position_ids=take(state.position_ids),
        position_embeddings=(take(cos), take(sin)),
    )


def _move(segments: Segments, before: Sequence[int], offset: int) -> Segments:
    """Segments of a shortened sample: `before[i]` positions are kept in front of position i, after `offset` of padding."""

    def moved(span: Span) -> Span:
        return Span(before[span.start] + offset, before[span.end] + offset)

    return Segments(
        system=moved(segments.system),
        images=tuple(moved(span) for span in segments.images),
        instruct=moved(segments.instruct),
        last_instruct=moved(segments.last_instruct),
        answer=moved(segments.answer),
    )


def _with_mask(model: nn.Module, config: SparseConfig, state: DecoderState, visible: Tensor) -> DecoderState:
    """`state` with masks for keys of which `visible` (B, S + L) are to be seen."""
    host: Any = model
    mask = None if bool(visible.all()) else visible
    causal_mask = create_causal_mask(
        config=host.get_decoder().config,
        inputs_embeds=state.hidden_states,
        attention_mask=mask,
        past_key_values=state.cache,
        layer_idx=config.sparse_layer,
        # No position_ids: their gaps would be taken for the borders of packed sequences.
    )
    return replace(state, attention_mask=mask, causal_mask=causal_mask)


def _later_pass(
    model: nn.Module, config: SparseConfig, state: DecoderState, cache: SparseCache, valid: Tensor
) -> DecoderState:
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
    state = _with_mask(model, config, state, torch.cat([cache.stored(valid.device), valid], dim=1))
    cache.plan_pass(keep, valid)
    return state

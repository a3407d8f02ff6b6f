"""Which tokens stay where nothing is asked of a loss: decisions of the predictors, plain torch.

`inference.py` carries them out; `moe_patch` carries this file into checkouts of upstream's LLaVA.

Shape letters: B batch, L sequence length, D width, N images of one length, n tokens of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynamic.config import SparseConfig, kept_count
from dynamic.layer import hard_keep, top_keep
from dynamic.model import Predictors
from dynamic.spans import Parts, Range


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
        newest = last_positions(valid).tolist()
        generated = [(sample.answer[0], end) for sample, end in zip(segments, newest, strict=True)]
        _keep_approved(judges.output_text, hidden, generated, keep)
    # Generation starts from the last position, be it of an image.
    return with_last(keep, valid)


def later_decision(judges: Predictors, hidden: Tensor, valid: Tensor) -> Tensor:
    """Which tokens on top of a filled cache are remembered, (B, L) bool.

    One is generated text, several are the next turn of the user, whose last token always stays.

    Args:
        judges: the predictors.
        hidden: (B, L, D) input of the sparse layer.
        valid: (B, L) bool, False at padding.
    """
    judge = judges.output_text if valid.shape[1] == 1 else judges.instruct
    if judge is None:
        return valid
    keep = valid & hard_keep(_judge(judge, hidden))
    if valid.shape[1] > 1:  # the answer is generated from the last one
        keep = with_last(keep, valid)
    return keep


def _judge(predictor: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (..., 2) on the device of `tokens`; the predictor may lie elsewhere and compute in another dtype."""
    weight = next(predictor.parameters())
    return predictor(tokens.to(weight.device, weight.dtype)).to(tokens.device)


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


def last_positions(valid: Tensor) -> Tensor:
    """(B,) int64: the last position of each sample that is not padding, by `valid` (B, L)."""
    return valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(dim=1)


def with_last(keep: Tensor, valid: Tensor) -> Tensor:
    """`keep` (B, L), changed in place, with the last position of each sample, from which generation starts."""
    keep[torch.arange(len(valid), device=valid.device), last_positions(valid)] = valid.any(dim=1)
    return keep

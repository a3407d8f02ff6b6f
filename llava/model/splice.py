"""Splicing image features into the embedded text by a plan (seam 2).

Corresponds to `prepare_inputs_labels_for_multimodal` of upstream's `llava_arch.py`. What goes where is decided in
`llava/data/splice_plan.py`; the segments follow the rules of Dynamic-LLaVA (section 3.5 of its fixtures: answer =
everything after the last ignored label).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava.data.splice_plan import plan_splice
from llava.segments import MultimodalInputs, SpliceOptions, SplicePlan


def splice(
    input_ids: Tensor,
    labels: Tensor | None,
    attention_mask: Tensor | None,
    images: Sequence[Tensor] | None,
    embed_tokens: nn.Module,
    options: SpliceOptions,
) -> MultimodalInputs:
    """Replace every image token by the features of the next image and pad the batch again.

    Args:
        input_ids: (B, T) with `IMAGE_TOKEN_INDEX` at images; padded on any side.
        labels: (B, T) or None (inference: everything counts as ignored).
        attention_mask: (B, T), zero at padding, or None.
        images: features (P_i, D), consumed in row order, one per image token; a row without image token consumes one
            and adds nothing. None for a batch that never had images, which is not cut.
        embed_tokens: embedding table of the language model.
        options: lengths, sides and marker.

    Returns:
        The batch; `labels` is None where None was given.

    Raises:
        ValueError: more or fewer images than the rows need, or image tokens without any image.
    """
    lengths = None if images is None else [len(features) for features in images]
    plan = plan_splice(input_ids, labels, attention_mask, lengths, options)
    inputs = carry_out(plan.to(input_ids.device), images, embed_tokens)
    if labels is None:
        inputs.labels = None
    return inputs


def carry_out(plan: SplicePlan, images: Sequence[Tensor] | None, embed_tokens: nn.Module) -> MultimodalInputs:
    """The embeddings that a plan describes; nothing here waits for the device.

    Args:
        plan: on the device of the embeddings.
        images: features (P_i, D) of every image of the batch; None for a batch that never had images.
        embed_tokens: embedding table of the language model.

    Raises:
        ValueError: the images have another number of features than the plan was made for.
    """
    found = None if images is None else sum(len(features) for features in images)
    if found != plan.features:
        raise ValueError(
            f"the plan of this batch was made for {plan.features} rows of image features, but vision tower and "
            f"projector give {found}; plan it with the settings of this model (`model.splice_planner()`)"
        )
    embeds = embed_tokens(plan.input_ids)  # (B, L, D)
    if plan.padding != "none":
        embeds = embeds.masked_fill(~plan.attention_mask[..., None], 0.0)
    if images:
        # Features that nobody sees stay in the graph with zero weight: every rank runs tower and projector.
        features = torch.cat(list(images)).to(embeds.dtype)  # (features, D)
        if plan.feature_rows is not None:
            features = features.index_select(0, plan.feature_rows)
        embeds = embeds.flatten(0, 1).index_put((plan.slots,), features).view_as(embeds)
    return MultimodalInputs(
        embeds, plan.labels, plan.attention_mask, plan.position_ids, plan.segments, plan, plan.packed
    )


def check_plan(plan: SplicePlan, input_ids: Tensor, options: SpliceOptions) -> None:
    """Refuse a plan that was not made of this batch for this model.

    Ids are compared where they are on the CPU; elsewhere their shape alone, since looking at them would be waited for.

    Raises:
        ValueError: it was made of other ids, or with other lengths and sides; names both.
    """
    if plan.source.shape != input_ids.shape:
        raise ValueError(
            f"the plan is of ids of shape {tuple(plan.source.shape)}, the batch has {tuple(input_ids.shape)}; "
            "plan each batch by itself, or leave `plan` out"
        )
    rows = [] if torch.compiler.is_compiling() else _other_rows(plan.source, input_ids)
    if rows:
        raise ValueError(
            f"the plan is of other ids than those of the batch in rows {rows}; plan each batch by itself, or leave "
            "`plan` out"
        )
    wanted = replace(options, max_length=None) if plan.features is None else options
    if plan.options != wanted:
        raise ValueError(
            f"the plan was made with {plan.options}, but the configuration of the model says {wanted}; make it by "
            "`model.splice_planner()` with the settings of now, or leave `plan` out"
        )


def _other_rows(planned: Tensor, given: Tensor) -> list[int]:
    """Rows (B, T) that differ, as far as it can be seen without waiting for a device."""
    if planned is given or planned.device.type != "cpu" or given.device.type != "cpu" or torch.equal(planned, given):
        return []
    return (planned != given).any(dim=1).nonzero().flatten().tolist()


def count_targets(input_ids: Tensor, labels: Tensor, image_lengths: Sequence[int], max_length: int | None) -> Tensor:
    """Number of positions that carry loss after splicing and truncation, without building embeddings.

    Args:
        input_ids: (B, T) with image tokens, padded on the right.
        labels: (B, T).
        image_lengths: sequence positions that each image takes, in row order; a row without image token has one
            entry, its dummy image. Empty for a batch that never had images.
        max_length: as in `SpliceOptions`; a batch that never had images is not cut.

    Returns:
        int64 scalar; the first position of a row is never a target, since nothing predicts it.
    """
    options = SpliceOptions(max_length, "right")
    return torch.tensor(plan_splice(input_ids, labels, None, list(image_lengths) or None, options).targets)

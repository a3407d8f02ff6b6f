"""Upstream's model with predictors: the losses of a pass with labels, dropped tokens in one without.

A pass runs through a view of the model whose decoder is a `DecoderOfPass`; the model itself stays as it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dynamic.config import SparseConfig
from dynamic.model import predictors
from dynamic.training import MaskedPass
from moe_patch.payload.sparse_attention import check_unwrapped, let_layers_be_sparse
from moe_patch.payload.sparse_decoder import DecoderOfPass
from moe_patch.payload.sparse_inputs import splice
from moe_patch.payload.sparse_state import ATTRIBUTE, Sparsity
from moe_patch.payload.views import like, with_children

SEGMENTS = "segments"
"""Argument of a model with predictors: the parts of each sample, for embeddings that are spliced already."""


def install(model: Any, settings: SparseConfig) -> None:
    """Let a bare model of upstream's class whose decoder has predictors use them.

    Raises:
        ValueError: the model is wrapped or has what is not carried.
    """
    check_unwrapped(model)
    let_layers_be_sparse(model.get_decoder().layers[settings.sparse_layer :])
    setattr(model, ATTRIBUTE, Sparsity(settings))
    model.config.sparse_config = settings.to_dict()
    model.__class__ = sparse_class(type(model))


@functools.cache
def sparse_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class of a model of upstream's class `plain` that uses its predictors; of the same name."""
    inner: Any = plain

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        images: Any = None,
        image_sizes: Any = None,
        segments: Any = None,
        **kwargs: Any,
    ) -> Any:
        if args:
            raise TypeError("a model with predictors takes what comes behind `labels` by name")
        # A prompt is spliced here, so that the parts of each sample are known.
        if inputs_embeds is None and past_key_values is None:
            given = splice(self, input_ids, position_ids, attention_mask, labels, images, image_sizes)
            input_ids, inputs_embeds, segments = None, given.inputs_embeds, given.segments
            position_ids, attention_mask, labels = given.position_ids, given.attention_mask, given.labels
        elif images is not None:
            raise ValueError("images belong to a prompt: they come with token ids, and on top of no filled cache")
        elif inputs_embeds is None:
            input_ids, inputs_embeds = None, self.get_model().embed_tokens(input_ids)
        # With labels a policy masks tokens, and its losses are added; without them tokens are dropped.
        sparsity = getattr(self, ATTRIBUTE)
        masked = None if labels is None else MaskedPass(sparsity.schedule.tau if self.training else None)
        if masked is not None and segments is None:
            raise ValueError(
                f"a loss needs the parts of each sample: pass token ids, or '{SEGMENTS}' with the embeddings"
            )
        # Upstream's own pass, about a decoder that is made for it.
        judges = predictors(self)
        decoder = DecoderOfPass(self.get_decoder(), sparsity.settings, judges, segments, masked)
        output = inner.forward(
            with_children(self, model=decoder),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )
        return output if masked is None else _with_losses(output, masked, sparsity, judges, self.training)

    def prepare_inputs_for_generation(
        self: Any, input_ids: Tensor, past_key_values: Any = None, *args: Any, segments: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        # Only the first pass of an answer has a prompt.
        found = inner.prepare_inputs_for_generation(self, input_ids, past_key_values, *args, **kwargs)
        return found if past_key_values is not None else {**found, SEGMENTS: segments}

    @torch.no_grad()
    def generate(
        self: Any, inputs: Tensor | None = None, images: Any = None, image_sizes: Any = None, **kwargs: Any
    ) -> Any:
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None or "inputs_embeds" in kwargs:
            raise ValueError("`inputs_embeds` is not supported; pass token ids")
        if not kwargs.setdefault("use_cache", True):
            raise ValueError("use_cache False: --dynamic is carried by moe_patch for generation with a cache alone")
        # The caller's mask and positions are those of its tokens; the splice makes those of the embeddings.
        positions, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        given = splice(self, ids, positions, mask, None, images, image_sizes)
        # The method behind upstream's, which would splice by itself and take no embeddings.
        return super(inner, self).generate(
            position_ids=given.position_ids,
            attention_mask=given.attention_mask,
            inputs_embeds=given.inputs_embeds,
            **{SEGMENTS: given.segments},
            **kwargs,
        )

    # The names of the plain class: files and messages of upstream's code have them.
    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    forward_like = like(inner.forward, forward, SEGMENTS)
    prepare = like(inner.prepare_inputs_for_generation, prepare_inputs_for_generation, SEGMENTS)
    methods = {"forward": forward_like, "prepare_inputs_for_generation": prepare, "generate": generate}
    return type(plain.__name__, (plain,), {**own, **methods})


def _with_losses(output: Any, masked: MaskedPass, sparsity: Sparsity, judges: Any, training: bool) -> Any:
    """The output of a pass with the keep-rate losses added to its loss, which comes first in a tuple."""
    losses = masked.losses(sparsity.settings, judges)
    sparsity.losses = {name: loss.detach() for name, loss in losses.items()}
    if training:
        sparsity.statistics.add(masked.decisions)
    added = sum(losses.values())
    if isinstance(output, tuple):
        return (output[0] + added, *output[1:])
    output.loss = output.loss + added
    return output

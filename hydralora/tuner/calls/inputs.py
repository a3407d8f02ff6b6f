"""What the arguments of a forward pass say about its tokens, whatever model it is a pass of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hydralora.tuner.batch import IGNORED
from hydralora.tuner.caches import given_cache, strange_state

PROMPT_MASK = "prompt_mask"
"""Argument of this package's own, (B, T): the tokens that decide. It is taken out before the model sees it."""

PACKED = ("position_ids", "cu_seq_lens_q", "seq_idx")
DECODER = "decoder_"
"""How the arguments of an encoder-decoder begin that are for its decoder."""


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of `forward`, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def token_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any], prefix: str = "") -> tuple[int, int] | None:
    """(B, T) of ids (B, T) or embeddings (B, T, D), the first argument or one of the usual names; None without.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        prefix: of the names; for `decoder_` positional arguments do not count.
    """
    first = () if prefix else args[:1]
    names = ("inputs", "input_ids", "inputs_embeds") if not prefix else (prefix + "input_ids", prefix + "inputs_embeds")
    for value in (*first, *(kwargs.get(name) for name in names)):
        if isinstance(value, Tensor) and value.ndim == (3 if value.is_floating_point() else 2):
            return value.shape[0], value.shape[1]
    return None


@dataclass(frozen=True)
class PassInputs:
    """The arguments of a pass that matter for routing by sequence.

    Attributes:
        shape: (B, T) of the tokens; None: not known. Those of the decoder in a pass of a whole encoder-decoder.
        mask: attention mask as it was given.
        labels: (B, T) next tokens, -100 where ignored, or None; only of a model that predicts tokens.
        prompt_mask: (B, T), or None.
        packed: arguments that tell packed sequences apart, by name.
        cache: or None.
        strange: name of an argument that continues a text without being a `Cache`; empty without one.
        pair: whether this is a pass of an encoder and its decoder.
        states: (B, S, D) of the encoder to which the pass attends, or None.
        states_mask: mask of those, as it was given.
        embedded: whether the tokens came as embeddings.
    """

    shape: tuple[int, int] | None
    mask: Any
    labels: Tensor | None
    prompt_mask: Tensor | None
    packed: dict[str, Any]
    cache: Cache | None
    strange: str
    pair: bool
    states: Tensor | None
    states_mask: Any
    embedded: bool


def read_inputs(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], predicts: bool) -> PassInputs:
    """Read the arguments of a call of a module.

    Args:
        names: of its positional arguments.
        args: positional arguments.
        kwargs: keyword arguments.
        predicts: whether its labels are next tokens; those of classifiers say nothing about the prompt.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    pair = any(name.startswith(DECODER) for name in names) and not any(
        name == "encoder_hidden_states" for name in names
    )
    labels = _next_tokens(named) if predicts else None
    prefix = DECODER if pair else ""
    shape = token_shape(args, named, prefix)
    if pair and shape is None and labels is not None:
        shape = labels.shape[0], labels.shape[1]  # the decoder's input is made from the labels
    cache = given_cache(args, kwargs)
    return PassInputs(
        shape=shape,
        mask=named.get(prefix + "attention_mask"),
        labels=labels,
        prompt_mask=named.get(PROMPT_MASK),
        packed={} if pair else {name: named[name] for name in PACKED if named.get(name) is not None},
        cache=cache,
        strange="" if cache is not None else strange_state(named),
        pair=pair,
        states=states if isinstance(states := named.get("encoder_hidden_states"), Tensor) else None,
        states_mask=named.get("encoder_attention_mask"),
        embedded=isinstance(named.get("inputs_embeds"), Tensor),
    )


def _next_tokens(named: Mapping[str, Any]) -> Tensor | None:
    """Labels (B, T) at the places of their own tokens; `shift_labels` are one place further left."""
    labels, shifted = named.get("labels"), named.get("shift_labels")
    if labels is None and isinstance(shifted, Tensor) and shifted.ndim == 2:
        return torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=IGNORED)
    return labels if isinstance(labels, Tensor) and labels.ndim == 2 else None

"""The note of a forward pass, made of the arguments of its call: what the prompt is, or why that cannot be said.

The rules: labels or `prompt_mask` say where the prompt ends. In a generation it is the input of `generate`. Without
any of them all tokens of the pass decide, except in training of a model that predicts tokens, which would look ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hydralora.tuner.batch import IGNORED, BatchNote, prompt_tokens
from hydralora.tuner.caches import carried, carry, is_filled
from hydralora.tuner.calls.generation import Generation
from hydralora.tuner.calls.inputs import PassInputs
from hydralora.tuner.calls.packing import sequence_starts

NO_TOKENS = (
    "this part of the model sees neither input_ids nor inputs_embeds; route by token in layers whose tokens are not "
    "those of the text, or leave them out (exclude_modules)"
)
NO_PROMPT = (
    "in training the tokens before the first target decide, but this forward pass has no labels (a trainer with "
    "label_smoothing_factor or a loss function of its own keeps them, others compute log-probabilities of given "
    "answers), and a mean over all tokens would look ahead at the answers. Pass labels, or prompt_mask=(batch, tokens) "
    "which is true at the tokens of the prompt, to the forward pass, or route by token"
)
GUIDED = "guidance_scale with use_cache=False reads generated tokens as a prompt; generate with a cache"
CHUNKED = (
    "the prompt has {length} tokens, but this pass reads {tokens} of them: the whole prompt decides before its "
    "first token is processed. Read it in one pass, or route by token"
)
CONTINUED = (
    "generate was given the tokens that follow a filled cache, whose prompt was routed without them, so the numbers "
    "would differ from those of the whole text. Pass all tokens, or route by token"
)
UNCLEAR = (
    "a pass of {tokens} tokens continues from a filled cache, and does not say whether they are of the prompt, which "
    "would have been routed as a whole, or of the answer. Read the whole prompt in one pass; for tokens of the answer "
    "pass prompt_mask=torch.zeros({batch}, {tokens}, dtype=torch.bool), or one token at a time"
)
MORE_PROMPT = "a pass that continues from a filled cache has tokens of the prompt; read the whole prompt in one pass"
STRANGE = (
    "the pass continues from '{name}', which cannot carry the weights of its prompt; let generate of transformers call "
    "the model, use no cache, or route by token"
)
BAD_MASK = (
    "{name} is a {kind}, which does not say what is padding; pass one of shape {expected}, zero at padding, or "
    "prompt_mask"
)
BAD_SHAPE = "{name} has the shape {shape}, but the tokens of the pass {expected}"


def note_of_pass(inputs: PassInputs, generation: Generation | None, told: bool) -> BatchNote:
    """The note of a forward pass.

    Args:
        inputs: its arguments.
        generation: the call of `generate` whose pass it is, or None.
        told: whether it must say what its prompt is.
    """
    if generation is not None:
        return _of_generation(inputs, generation)
    if inputs.shape is None:
        return BatchNote(refusal=NO_TOKENS)
    if inputs.strange:
        return BatchNote(shape=inputs.shape, refusal=STRANGE.format(name=inputs.strange))
    if inputs.cache is not None and is_filled(inputs.cache):
        return _continued(inputs, inputs.shape, inputs.cache)
    if told and inputs.labels is None and inputs.prompt_mask is None:
        return BatchNote(shape=inputs.shape, refusal=NO_PROMPT)
    return _fresh(inputs, inputs.shape, inputs.mask)


def crossing(states: Tensor, mask: Any) -> BatchNote:
    """The note of an encoder's tokens, whose states (B, S, D) a decoder attends to: all valid ones decide."""
    shape = (states.shape[0], states.shape[1])
    if mask is not None and not _fits(mask, shape):
        return BatchNote(shape=shape, refusal=_bad_mask("encoder_attention_mask", mask, shape))
    return BatchNote(torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0, shape)


def _of_generation(inputs: PassInputs, generation: Generation) -> BatchNote:
    """The note of a pass of `generate`, which reads the prompt or continues it."""
    first, total, shape = not generation.begun, generation.total, inputs.shape
    generation.begun, generation.pending = True, False
    if shape is None:
        return BatchNote(refusal=NO_TOKENS)
    if first and inputs.cache is not None and is_filled(inputs.cache):
        if generation.assistant:  # another model judges what it proposes
            return BatchNote(shape=shape, continues=True, weights=carried(inputs.cache) or {})
        return BatchNote(shape=shape, refusal=CONTINUED)
    if generation.prepares:
        again = inputs.cache is None and shape[1] == total  # without a cache each pass reads all tokens so far
    else:
        again = inputs.cache is None or not is_filled(inputs.cache)
    if not first and not again:
        found = None if inputs.cache is None else carried(inputs.cache)
        return BatchNote(shape=shape, continues=True, weights=generation.weights if found is None else found)
    if first and (generation.prompt_length is None or inputs.embedded):
        generation.prompt_length = shape[1]
    length = shape[1] if generation.prompt_length is None else generation.prompt_length
    if shape[1] < length:
        return BatchNote(shape=shape, refusal=CHUNKED.format(length=length, tokens=shape[1]))
    note = _fresh(inputs, shape, generation.mask if generation.prepares else inputs.mask, length)
    generation.weights = note.weights
    return note


def _continued(inputs: PassInputs, shape: tuple[int, int], cache: Cache) -> BatchNote:
    """The note of a pass that continues from a filled cache, outside of `generate`: one token has been generated."""
    known = inputs.prompt_mask
    if known is None and inputs.labels is not None and inputs.labels.shape == shape:
        known = inputs.labels[:, :1] == IGNORED
    if known is not None and bool(known.any()):
        return BatchNote(shape=shape, refusal=MORE_PROMPT)
    if known is None and shape[1] > 1:
        return BatchNote(shape=shape, refusal=UNCLEAR.format(batch=shape[0], tokens=shape[1]))
    return BatchNote(shape=shape, continues=True, weights=carried(cache) or {})


def _fresh(inputs: PassInputs, shape: tuple[int, int], mask: Any, length: int | None = None) -> BatchNote:
    """The note of a pass that begins its texts.

    Args:
        inputs: its arguments.
        shape: (B, T) of its tokens.
        mask: (B, T), zero at padding, or None.
        length: tokens from the start of a row that may decide; None: all.
    """
    name = "decoder_attention_mask" if inputs.pair else "attention_mask"
    chosen = inputs.prompt_mask
    if mask is not None and not _fits(mask, shape):
        if chosen is None:
            return BatchNote(shape=shape, refusal=_bad_mask(name, mask, shape))
        mask = None
    for given, values in (("labels", inputs.labels), ("prompt_mask", chosen)):
        if values is not None and values.shape != shape:
            text = BAD_SHAPE.format(name=given, shape=tuple(values.shape), expected=shape)
            return BatchNote(shape=shape, refusal=text)
    if length is None and not (isinstance(mask, Tensor) and mask.is_floating_point()):
        starts = sequence_starts(shape, mask, inputs.packed, continuous=mask is None and inputs.cache is None)
    else:
        starts = None
    if chosen is not None:
        prompt = chosen.bool() if mask is None else chosen.bool() & (mask != 0).to(chosen.device)
    else:
        labels = inputs.labels
        if mask is None and labels is None:
            mask = torch.ones(shape, dtype=torch.bool)
        prompt = prompt_tokens(mask, labels, starts, shifted=inputs.pair)
    if length is not None:
        prompt = prompt & (torch.arange(shape[1], device=prompt.device) < length)
    note = BatchNote(prompt, shape, starts)
    if starts is None:
        carry(inputs.cache, note.weights)
    return note


def _fits(mask: Any, shape: tuple[int, int]) -> bool:
    return isinstance(mask, Tensor) and tuple(mask.shape) == tuple(shape)


def _bad_mask(name: str, mask: Any, expected: tuple[int, int]) -> str:
    kind = f"tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    return BAD_MASK.format(name=name, kind=kind, expected=expected)

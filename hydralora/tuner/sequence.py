"""Weights of the experts that hold for a whole sequence: the mean of the router over its prompt.

What is the prompt, and whether a pass continues one, says the note of the pass (`batch.py`).

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydralora.tuner.batch import BatchNote, Kept

NOT_ROUTED = (
    "routing='sequence': adapter '{name}' is to go on from a cache whose prompt it has not routed (or whose rows "
    "were packed, or are other ones); run the prompt again with this adapter"
)


class RoutingBySequenceError(ValueError):
    """The weights of a sequence cannot be told for this call; the message says what to do."""


def sequence_weights(
    note: BatchNote, key: tuple[int, str], probabilities: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Weights of whole sequences, for the router's probabilities of each token.

    Some models flatten a batch before a layer, as OPT: (B * T, E) are returned for `probabilities` (B * T, E).

    Args:
        note: of the pass in which the layer runs.
        key: of the layer and adapter, under which the weights of a prompt are kept for its later tokens.
        probabilities: (B, T, E) or (B * T, E), float32.
        rows: which rows of the batch these are, in a batch of several adapters; None: all.

    Returns:
        (B, 1, E), for packed rows (B, T, E), or (B * T, E) for such probabilities.

    Raises:
        RoutingBySequenceError: the tokens are not those of the pass, it continues a prompt which this adapter has not
            seen, or the call does not say what the prompt is.
    """
    if note.refusal is not None:
        raise RoutingBySequenceError(f"routing='sequence': {note.refusal}")
    shape = note.shape
    if shape is None or probabilities.shape[:-1] != (shape[0] * shape[1],):
        return _of_sequences(note, key, probabilities, rows)
    weights = _of_sequences(note, key, probabilities.unflatten(0, shape), rows)
    return weights.expand(*shape, -1).flatten(0, 1)


def _of_sequences(note: BatchNote, key: tuple[int, str], probabilities: Tensor, rows: Tensor | None) -> Tensor:
    """Mean (B, 1, E) of `probabilities` (B, T, E) over the prompt; later tokens take that of their prompt."""
    expected = None if note.shape is None else (note.shape[0] if rows is None else len(rows), note.shape[1])
    if probabilities.ndim != 3 or expected not in (None, probabilities.shape[:-1]):
        raise RoutingBySequenceError(
            f"routing='sequence': this layer sees tokens of shape {tuple(probabilities.shape[:-1])}, but the "
            f"batch has {expected or '(rows, tokens)'}; route by token in layers whose tokens are not those of the text"
        )
    if note.continues:
        return _kept(note, key, rows).to(probabilities.device)
    prompt = torch.ones_like(probabilities[..., 0]) if note.prompt is None else _rows(note.prompt, rows)
    mask = prompt.to(probabilities)[..., None]  # (B, T, 1)
    if note.starts is not None:
        return _of_packed(probabilities * mask, mask, _rows(note.starts, rows).to(probabilities.device))
    mean = (probabilities * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    note.weights[key] = _keep(note, mean.detach(), rows)
    return mean


def _of_packed(chosen: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    """Mean (B, T, E) of `chosen` (B, T, E), zero where `mask` (B, T, 1) is, over the sequence of each token."""
    batch, tokens, experts = chosen.shape
    first = torch.arange(batch, device=starts.device)[:, None] * tokens
    sequence = (first + starts).flatten()  # (B * T): where the sequence of a token begins in the flattened batch
    sums = torch.zeros(batch * tokens, experts + 1, dtype=chosen.dtype, device=chosen.device)
    sums = sums.index_add(0, sequence, torch.cat([chosen, mask], dim=-1).flatten(0, 1))
    return (sums[:, :-1] / sums[:, -1:].clamp(min=1))[sequence].view(batch, tokens, experts)


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows.to(values.device)]


def _keep(note: BatchNote, mean: Tensor, rows: Tensor | None) -> Kept:
    """The weights for later tokens, with a place for each row of the batch, so that rows of a cache can move."""
    if rows is None or note.shape is None:
        return Kept(mean)
    weights = mean.new_zeros(note.shape[0], *mean.shape[1:])
    weights[rows] = mean
    routed = torch.zeros(note.shape[0], dtype=torch.bool, device=mean.device)
    routed[rows] = True
    return Kept(weights, routed)


def _kept(note: BatchNote, key: tuple[int, str], rows: Tensor | None) -> Tensor:
    """The weights (B, 1, E) of the prompts that this pass continues."""
    kept = note.weights.get(key)
    if kept is None or (note.shape is not None and len(kept.weights) != note.shape[0]):
        raise RoutingBySequenceError(NOT_ROUTED.format(name=key[1]))
    if kept.routed is not None and not bool(_rows(kept.routed, rows).all()):
        raise RoutingBySequenceError(NOT_ROUTED.format(name=key[1]))
    return _rows(kept.weights, rows)

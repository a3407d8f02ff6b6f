"""Weights of the experts that hold for a whole sequence: the mean of the router over its prompt.

What is the prompt, and whether a pass continues one, says the note of the pass (`batch.py`).

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from hydralora.tuner.batch import BatchNote


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
        (B, 1, E), or (B * T, E) for such probabilities.

    Raises:
        ValueError: the tokens are not those of the pass, or it continues a prompt which this adapter has not seen.
    """
    shape = note.shape
    if shape is None or probabilities.shape[:-1] != (shape[0] * shape[1],):
        return _of_sequences(note, key, probabilities, rows)
    weights = _of_sequences(note, key, probabilities.unflatten(0, shape), rows)  # (B, 1, E)
    return weights.expand(*shape, -1).flatten(0, 1)


def _of_sequences(note: BatchNote, key: tuple[int, str], probabilities: Tensor, rows: Tensor | None) -> Tensor:
    """Mean (B, 1, E) of `probabilities` (B, T, E) over the prompt; later tokens take that of their prompt."""
    if note.continues:
        weights = note.weights.get(key)
        if weights is None or len(weights) != len(probabilities):
            raise ValueError(
                f"routing='sequence': adapter '{key[1]}' is to go on from a cache whose prompt it has not "
                "routed; run the prompt again with this adapter"
            )
        return weights
    prompt = note.prompt
    if prompt is None:
        mean = probabilities.mean(dim=-2, keepdim=True)
    else:
        prompt = prompt if rows is None else prompt[rows.to(prompt.device)]
        if prompt.shape != probabilities.shape[:-1]:
            raise ValueError(
                f"routing='sequence': this layer sees tokens of shape {tuple(probabilities.shape[:-1])}, but the "
                f"batch has {tuple(prompt.shape)}; route by token in layers whose tokens are not those of the text"
            )
        mask = prompt.to(probabilities)[..., None]  # (B, T, 1)
        mean = (probabilities * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    note.weights[key] = mean.detach()
    return mean

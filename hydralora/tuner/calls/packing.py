"""Where sequences begin in packed rows: several texts in one row, told apart by positions, lengths or numbers.

As padding-free training makes them (`DataCollatorWithFlattening`, packing of TRL). Attention separates the texts by
the same arguments, so what it separates is routed apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sequence_starts(
    shape: tuple[int, int], mask: Tensor | None, given: dict[str, Any], continuous: bool = True
) -> Tensor | None:
    """The column in which the sequence of each token begins.

    Args:
        shape: (B, T) of the tokens.
        mask: (B, T), zero at padding; numbers that differ are different sequences. None: all tokens are valid.
        given: arguments of the forward pass: `position_ids` (B, T), (T,) or (axes, B, T), `cu_seq_lens_q` (sequences
            + 1,) over the flattened batch, `seq_idx` (B, T).
        continuous: whether a gap in the positions begins a sequence, as attention without a mask has it; else only a
            position that is not above the last one does.

    Returns:
        (B, T) int, or None if every row is one sequence.

    Raises:
        ValueError: `cu_seq_lens_q` does not cover the batch.
    """
    rows, columns = shape
    if columns < 2:
        return None
    device = next((value.device for value in (mask, *given.values()) if isinstance(value, Tensor)), None)
    places = torch.arange(columns, device=device).expand(rows, columns)
    valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask != 0
    # The last valid token before each one, -1 for none: padding separates nothing.
    last = torch.where(valid, places, -1).cummax(dim=1).values.roll(1, dims=1)
    last = torch.where(places == 0, -1, last)
    comparable = valid & (last >= 0)
    begins = [_breaks(given.get("position_ids"), shape, last, continuous), _changes(given.get("seq_idx"), shape, last)]
    if mask is not None and mask.dtype not in (torch.bool,) and not mask.is_floating_point():
        begins.append(_changes(mask, shape, last))
    begins = [begin & comparable for begin in begins if begin is not None]
    if given.get("cu_seq_lens_q") is not None:
        begins.append(_at(torch.as_tensor(given["cu_seq_lens_q"], device=device), shape))
    if not begins:
        return None
    new = torch.stack(begins).any(dim=0) & (places > 0)
    if not torch.compiler.is_compiling() and not bool(new.any()):
        return None
    return torch.where(new, places, 0).cummax(dim=1).values


def _breaks(positions: Any, shape: tuple[int, int], last: Tensor, continuous: bool) -> Tensor | None:
    """Tokens (B, T) whose position does not go on from that of the valid token before."""
    if not isinstance(positions, Tensor) or positions.shape[-1] != shape[1]:
        return None
    spatial = False
    if positions.ndim == 3:  # (axes, B, T): of text, time, height, width, or without the first
        spatial = len(positions) == 3  # tokens of one image share their time
        positions = positions[0]
    positions = positions.to(last.device).expand(shape)
    step = positions - positions.gather(1, last.clamp(min=0))
    if spatial:
        return step < 0
    return step != 1 if continuous else step <= 0


def _changes(numbers: Any, shape: tuple[int, int], last: Tensor) -> Tensor | None:
    """Tokens (B, T) whose sequence has another number than that of the valid token before."""
    if not isinstance(numbers, Tensor) or numbers.shape[-1] != shape[1]:
        return None
    numbers = numbers.to(last.device).expand(shape)
    return numbers != numbers.gather(1, last.clamp(min=0))


def _at(bounds: Tensor, shape: tuple[int, int]) -> Tensor:
    """Tokens (B, T) at which a sequence begins, by the bounds of all in the flattened batch."""
    count = shape[0] * shape[1]
    if not torch.compiler.is_compiling() and int(bounds[-1]) != count:
        raise ValueError(f"cu_seq_lens_q ends at {int(bounds[-1])}, but the batch {shape} has {count} tokens")
    begins = torch.zeros(count, dtype=torch.bool, device=bounds.device)
    begins[bounds[:-1].long()] = True
    return begins.view(shape)

"""Vicuna: published as full weights, or as the difference to LLaMA, which has to be added.

The difference is made in the layout of transformers. LaVIN (`util/apply_delta.py`) adds it to Meta's layout, whose
query and key rows stand in another order, and so trains on another model than Vicuna; here both have the same layout
before they are added. `docs/differences.md` has the numbers.
"""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path

from torch import Tensor

from llava.errors import CheckpointError
from mma.weights.tensors import LazyTensor, Weights

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""May have more rows than the base's: Vicuna v0 added a padding token behind."""

CLOSE = 0.5
"""What counts as near, relative to the norms of the base: fine-tuning moves them by a few percent."""


class VicunaKind(StrEnum):
    """How a Vicuna is stored."""

    FULL = "full"
    DELTA = "delta"


def kind_of(vicuna: Weights, base: Weights, folder: Path) -> VicunaKind:
    """Whether a folder holds Vicuna itself or its difference to the base, by its RMSNorm weights.

    Fine-tuned norms lie close to those of the base, a difference of norms lies close to zero.

    Raises:
        CheckpointError: neither is the case.
    """
    moved = size = total = 0.0
    for name, tensor in base.items():
        if len(tensor.shape) == 1 and name in vicuna:
            before, after = tensor.read().float(), vicuna[name].read().float()
            moved += float((after - before).square().sum())
            size += float(after.square().sum())
            total += float(before.square().sum())
    if moved < CLOSE**2 * total and moved < size:
        return VicunaKind.FULL
    if size < CLOSE**2 * total:
        return VicunaKind.DELTA
    raise CheckpointError(
        f"{folder}: its norms are neither near those of the base (full weights) nor near zero (a difference); if it "
        "does belong to this base, say what it is by --vicuna_weights full or delta"
    )


def _sum(base: LazyTensor, delta: LazyTensor) -> Tensor:
    result = delta.read().float().clone()
    before = base.read()
    result[: len(before)] += before.float()
    return result.to(base.dtype)


def add_delta(base: Weights, delta: Weights, folder: Path) -> dict[str, LazyTensor]:
    """The weights of Vicuna: base plus difference, computed in fp32 and kept in the dtype of the base.

    Args:
        base: in the layout of transformers.
        delta: the difference, of the same names.
        folder: of the difference, for messages.

    Raises:
        CheckpointError: the two do not belong together.
    """
    lacking, strange = sorted(base.keys() - delta.keys()), sorted(delta.keys() - base.keys())
    if lacking or strange:
        raise CheckpointError(f"{folder}: is no difference to this base; lacks {lacking[:3]}, has also {strange[:3]}")
    for name, tensor in base.items():
        shape = delta[name].shape
        grown = name in TABLES and shape[0] > tensor.shape[0] and shape[1:] == tensor.shape[1:]
        if shape != tensor.shape and not grown:
            raise CheckpointError(f"{folder}: '{name}' has shape {shape}, but {tensor.shape} in the base")
    return {
        name: LazyTensor(delta[name].shape, tensor.dtype, partial(_sum, tensor, delta[name]))
        for name, tensor in base.items()
    }

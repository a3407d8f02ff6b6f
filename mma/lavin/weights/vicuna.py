"""Vicuna: published as full weights, or as the difference to LLaMA, which has to be added.

The difference is made in the layout of transformers. LaVIN (`util/apply_delta.py`) adds it to Meta's layout, whose
query and key rows are in another order, and so trains on another model than Vicuna. Here both have the same layout
before they are added; the published adapters that LaVIN trained on its own sum get that sum from `original_sum`.
`docs/differences.md` has the numbers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import LlamaConfig

from llava.errors import CheckpointError
from mma.lavin.weights.choices import VicunaKind
from mma.lavin.weights.meta import to_half_split
from mma.lavin.weights.tensors import LazyTensor, Weights

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""May have more rows than the base's: Vicuna v0 added a padding token behind."""

CLOSE = 0.5
"""What counts as near, relative to the norms of the base: fine-tuning moves them by a few percent."""

SMALL = 0.05
"""Root mean square of RMSNorm weights below which they are a difference: those of LLaMA have 0.4 and more."""

ROTATED = {"self_attn.q_proj.weight": "num_attention_heads", "self_attn.k_proj.weight": "num_key_value_heads"}
"""Projections whose rows are in another order in Meta's layout, and the setting with the number of their heads."""


def kind_by_itself(vicuna: Weights) -> VicunaKind | None:
    """What a folder holds, by its RMSNorm weights alone; None if they do not say it.

    Norms are factors, nearly all of them positive; a difference of norms is small, or has either sign.
    """
    size = total = 0.0
    count = 0
    for tensor in vicuna.values():
        if len(tensor.shape) == 1:
            values = tensor.read().double()
            count, total, size = count + len(values), total + float(values.sum()), size + float(values.square().sum())
    if not count:
        return None
    mean, deviation = total / count, (size / count) ** 0.5
    if deviation < SMALL or abs(mean) < CLOSE * deviation:
        return VicunaKind.DELTA
    return VicunaKind.FULL if mean > 0 else None


def kind_beside(vicuna: Weights, base: Weights) -> VicunaKind | None:
    """What a folder holds, by its RMSNorm weights next to those of the base; None if they do not say it.

    Fine-tuned norms are close to those of the base, a difference of norms is close to zero.
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
    return VicunaKind.DELTA if size < CLOSE**2 * total else None


def kind_of(vicuna: Weights, base: Weights, folder: Path) -> VicunaKind:
    """Whether a folder holds Vicuna itself or its difference to the base.

    Raises:
        CheckpointError: its norms do not say it.
    """
    kind = kind_beside(vicuna, base)
    if kind is None:
        raise CheckpointError(
            f"{folder}: its norms are neither near those of the base (full weights) nor near zero (a difference); if "
            "it does belong to this base, say what it is by --vicuna_weights full or delta"
        )
    return kind


def _rotated(delta: LazyTensor, heads: int) -> Tensor:
    return to_half_split(delta.read(), heads)


def original_sum(base: Weights, delta: Weights, config: LlamaConfig, folder: Path) -> dict[str, LazyTensor]:
    """The weights that LaVIN trains its Vicuna adapters on, in the layout of transformers.

    It adds the difference to Meta's layout: in that of transformers, the query and key rows of the difference are
    reordered once more. The sum is not Vicuna.

    Args:
        base: in the layout of transformers.
        delta: the difference, of the same names.
        config: of the base.
        folder: of the difference, for messages.

    Raises:
        CheckpointError: the folder holds full weights, or the two do not belong together.
    """
    if kind_beside(delta, base) is VicunaKind.FULL:
        raise CheckpointError(
            f"{folder}: holds full weights, but --vicuna_weights original is LaVIN's own sum of LLaMA and the "
            "published difference (vicuna-7b-delta-v1.1 or the like); get the difference, or pass full"
        )
    moved = dict(delta)
    for name, tensor in delta.items():
        heads = next((heads for suffix, heads in ROTATED.items() if name.endswith(suffix)), None)
        if heads is not None:
            moved[name] = LazyTensor(tensor.shape, tensor.dtype, partial(_rotated, tensor, getattr(config, heads)))
    return add_delta(base, moved, folder)


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

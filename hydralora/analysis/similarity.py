"""Do the A agree and the B differ? Cosines between adapters, layer by layer, in numbers (figure 3 of the paper).

The cosine compares matrices entry by entry, as the paper's figures do; it says something about adapters that started
from the same values. The overlap of subspaces does not depend on which basis a matrix uses for its r directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from hydralora.analysis.adapters import AdaptedLayer
from llava.errors import FlagError

Adapters = Mapping[str, Mapping[str, AdaptedLayer]]
"""Layers by name, of each adapter by its name."""


def common_layers(adapters: Adapters) -> list[str]:
    """Layers that every adapter has, in the order of the first.

    Raises:
        FlagError: there is none.
    """
    first, *others = adapters.values()
    names = [name for name in first if all(name in other for other in others)]
    if not names:
        raise FlagError(f"the adapters {list(adapters)} have no layer in common")
    return names


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of the same shape, entries in a row; 0 if one is zero."""
    lengths = a.norm() * b.norm()
    return float((a * b).sum() / lengths) if lengths > 0 else 0.0


def overlap(a: Tensor, b: Tensor) -> float:
    """How much of the smaller row space lies in the other: the mean squared cosine of their principal angles, 0 to 1.

    Args:
        a: (r, n), its rows span the space.
        b: (r', n).
    """
    first, second = (torch.linalg.qr(each.T).Q for each in (a, b))  # (n, r)
    return float((first.T @ second).square().sum() / min(first.shape[1], second.shape[1]))


def between_adapters(adapters: Adapters) -> list[dict[str, float | str]]:
    """For each common layer the mean cosine and overlap of all pairs of adapters, of A and of the mean B.

    A pair of matrices is left out of the cosines if their shapes differ, and of the overlaps if their rows lie in
    spaces of different size, as those of two base models may.
    """
    rows: list[dict[str, float | str]] = []
    for name in common_layers(adapters):
        found: dict[str, list[float]] = {"cosine_A": [], "cosine_B": [], "overlap_A": [], "overlap_B": []}
        for one, other in combinations([layers[name] for layers in adapters.values()], 2):
            for matrix, first, second in (
                ("A", one.shared_a, other.shared_a),
                ("B", one.experts_b.mean(dim=0).T, other.experts_b.mean(dim=0).T),  # (r, out_features)
            ):
                if first.shape == second.shape:
                    found[f"cosine_{matrix}"].append(cosine(first, second))
                if first.shape[1] == second.shape[1]:
                    found[f"overlap_{matrix}"].append(overlap(first, second))
        rows.append({"layer": name, **_means(found)})
    return rows


def between_experts(layers: Mapping[str, AdaptedLayer]) -> list[dict[str, float | str]]:
    """For each layer of one adapter with several experts: mean cosine and overlap of all pairs of its B."""
    rows: list[dict[str, float | str]] = []
    for layer in layers.values():
        pairs = list(combinations(layer.experts_b, 2))
        if pairs:
            found = {
                "cosine_B": [cosine(one, other) for one, other in pairs],
                "overlap_B": [overlap(one.T, other.T) for one, other in pairs],
            }
            rows.append({"layer": layer.name, **_means(found)})
    return rows


def mean_of(rows: Sequence[Mapping[str, float | str]]) -> dict[str, float]:
    """Mean of every number over the layers."""
    names = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    return {name: sum(values) / len(values) for name in sorted(names) if (values := _column(rows, name))}


def _column(rows: Sequence[Mapping[str, float | str]], name: str) -> list[float]:
    return [value for row in rows if isinstance(value := row.get(name), float)]


def _means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in found.items() if values}

"""What a routed model answers and how it routes, row by row of some inputs; rows that are routed alike.

Shape letters: B batch, T tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hydralora.layer import RoutedModule
from hydralora.linears import routed_updates
from hydralora.model import RoutingRecorder, of_text, routed_blocks


@dataclass
class Rows:
    """Rows of inputs in a model.

    Attributes:
        outputs: logits (tokens, V) at the valid tokens of each batch.
        sums: (E,) of the weights over the valid tokens of each row, by router.
        tokens: how many tokens a sum is over, by router.
    """

    outputs: list[Tensor] = field(default_factory=list)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """(tokens, V) of all."""
        return torch.cat(self.outputs)

    def mean(self, experts: Mapping[str, int]) -> dict[str, Tensor]:
        """Weights (E,) of each router over all tokens of all rows.

        Raises:
            ValueError: a layer did not see the tokens of the inputs.
        """
        unseen = sorted(name for name, count in experts.items() if name not in self.sums and count > 1)
        if unseen:
            raise ValueError(f"layers {unseen[:3]} do not see the tokens of the inputs; give weights instead of a mean")
        return {
            name: torch.stack(self.sums[name]).sum(dim=0) / sum(self.tokens[name]) if count > 1 else torch.ones(1)
            for name, count in experts.items()
        }

    def means(self) -> Tensor:
        """(rows, sum of all E): the mean weights of each row, routers next to one another."""
        return torch.cat(
            [torch.stack(sums) / torch.tensor(self.tokens[name])[:, None] for name, sums in self.sums.items()], dim=1
        )


def rows_of(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each row of a batch as a batch of one."""
    count = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)
    for row in range(count):
        yield {
            name: value[row : row + 1] if isinstance(value, Tensor | list) and len(value) == count else value
            for name, value in batch.items()
        }


@torch.no_grad()
def measured_rows(model: Any, bare: nn.Module, routers: set[str], inputs: Sequence[Mapping[str, Any]]) -> Rows:
    """Run a model in evaluation.

    Args:
        model: to call.
        bare: the model in whose names the routers are.
        routers: names of the layers that route.
        inputs: batches, as keyword arguments of the model.

    Raises:
        ValueError: images lengthen the rows of a batch that has padding, so that the valid tokens are not known.
    """
    modules = dict(bare.named_modules())
    layers: dict[str, Any] = {name: modules[name] for name in routers if isinstance(modules[name], RoutedModule)}
    sparse = {name for name, block in routed_blocks(bare).items() if not block.dense}
    updates = set(routed_updates(bare))
    recorder, found = RoutingRecorder(layers), Rows()
    for batch in inputs:
        recorder.start()
        try:
            output = model(**batch).logits.float().cpu()  # (B, T, V)
        finally:
            recorded = recorder.stop()
        valid = _valid(output.shape[:2], batch.get("attention_mask"))
        found.outputs.append(output[valid])
        seen = of_text(recorded, output.shape[:2])
        for name, passes in recorded.items():
            if name in seen:
                weights = (seen[name].choice if name in sparse else seen[name].probabilities).cpu().float()
                counted = [row[kept] for row, kept in zip(weights, valid, strict=True)]
            elif passes and name in updates:  # of a vision tower: patches, none of which is padding
                counted = [passes[-1].probabilities.cpu().float().flatten(0, -2)]
            else:
                continue
            found.sums.setdefault(name, []).extend(row.sum(dim=0) for row in counted)
            found.tokens.setdefault(name, []).extend(len(row) for row in counted)
    return found


def _valid(shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
    if mask is None or tuple(mask.shape) != tuple(shape):
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                f"the mask has the shape {tuple(mask.shape)} and padding, and the outputs {tuple(shape)}: give one "
                "sample per batch, without padding"
            )
        return torch.ones(shape, dtype=torch.bool)
    return mask.bool().cpu()


def similar_rows(points: Tensor, clusters: int, seed: int) -> list[list[int]]:
    """Numbers of the rows of `points` (rows, x) in each cluster of k-means, the clusters by their first row.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: there are fewer different rows than clusters.
    """
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("clusters need scikit-learn; run `pip install scikit-learn`") from error
    if len(torch.unique(points, dim=0)) < clusters:
        raise ValueError(
            f"{clusters} clusters, but only {len(torch.unique(points, dim=0))} rows are routed differently"
        )
    labels = KMeans(clusters, n_init=10, random_state=seed).fit(points.double().numpy()).labels_.tolist()
    return [[row for row, label in enumerate(labels) if label == number] for number in dict.fromkeys(labels)]

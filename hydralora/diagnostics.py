"""Whether the experts of a layer with a router are used, differ, and whether the router learns: the numbers behind it.

    balance     entropy of the mean routing, in nats; log E if all experts get the same share
    sharpness   mean entropy of the routing of a token; 0 if each has one expert, log E if the router says nothing
    effective   effective number of experts, 1 / sum of the squares of the mean routing
    dead        share of the experts whose mean routing is below a tenth of an equal share
    cosine      mean cosine of two matrices B, entry by entry; 1 if all experts are the same
    moved       distance of the router from its start (Frobenius norm)

Shape letters: E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hydralora.layer import RoutedModule
from hydralora.split import is_split

ROUTING = ("balance", "sharpness", "effective", "dead")
DEAD = 0.1
"""An expert is dead below this fraction of an equal share."""


@torch.no_grad()
def routing_numbers(probabilities: Tensor, valid: Tensor) -> Tensor:
    """The numbers of `ROUTING`, (..., 4) float32, for any number of layers at once.

    Args:
        probabilities: (..., tokens, E) float32.
        valid: (tokens,) float32, 1 at real tokens.
    """
    tokens = valid.sum().clamp(min=1)
    mean = valid @ probabilities / tokens  # (..., E)
    sharpness = torch.special.entr(probabilities).sum(dim=-1) @ valid / tokens
    effective = 1 / mean.square().sum(dim=-1).clamp(min=torch.finfo(mean.dtype).tiny)
    dead = (mean < DEAD / mean.shape[-1]).float().mean(dim=-1)
    return torch.stack([torch.special.entr(mean).sum(dim=-1), sharpness, effective, dead], dim=-1)


@torch.no_grad()
def mean_cosine(experts: Sequence[Tensor]) -> Tensor:
    """Mean cosine of two matrices, over all pairs in each of `experts` (E, out_features, r); 0 for B = 0."""
    found = []
    for matrices in experts:
        rows = torch.nn.functional.normalize(matrices.flatten(1).float(), dim=-1)  # (E, out_features * r)
        products = rows @ rows.T
        pairs = len(rows) * (len(rows) - 1)
        found.append((products.sum() - products.trace()) / max(1, pairs))
    return torch.stack(found).mean()


@contextmanager
def whole(modules: Sequence[RoutedModule]) -> Iterator[None]:
    """Within the block the weights of these layers are whole under DeepSpeed ZeRO-3; all processes have to enter it."""
    from peft.utils.integrations import gather_params_ctx

    with gather_params_ctx([weight for module in modules for _, weight in module.added_parameters()]):
        yield


def matrices(module: RoutedModule) -> tuple[list[Tensor], list[Tensor]] | None:
    """Routers and experts of a layer, see `RoutedModule.trained_matrices`; None where they are split over processes."""
    weights = [weight for _, weight in module.added_parameters() if weight.requires_grad]
    if any(is_split(weight) for weight in weights):
        return None
    if all(weight.ndim == 1 for weight in weights):
        return None
    return module.trained_matrices()

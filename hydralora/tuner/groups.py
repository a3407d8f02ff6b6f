"""Parameter groups for an optimizer that trains routers with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hydralora.block import RoutedMLP
from hydralora.layer import RoutedUpdate
from hydralora.tuner.parts import Router


def router_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all routers in a model, of frozen ones too: adapters, routed MLP blocks, routed updates."""
    for module in model.modules():
        if isinstance(module, Router):
            yield from module.parameters()
        elif isinstance(module, RoutedMLP):
            yield from module.router.parameters()
        elif isinstance(module, RoutedUpdate):
            yield module.router


def parameter_groups(
    model: nn.Module, *, router_lr: float, lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What is trained in a model, as groups for an optimizer of torch: the routers and all else.

    `Trainer(model, optimizers=(torch.optim.AdamW(groups, lr=2e-4), None))`; a scheduler scales the rate of each group.
    Biases, weights of norms and whatever else has fewer than two dimensions do not decay.

    Args:
        model: before it is wrapped by DeepSpeed or DistributedDataParallel.
        router_lr: learning rate of the routers.
        lr: of everything else; None: the one that the optimizer is made with.
        weight_decay: of matrices.

    Returns:
        Groups that are not empty, each with a `name`: `routers`, `others`, and the same with `_not_decayed`. Every
        trained parameter is in one of them.

    Raises:
        ValueError: no router is trained, so that `router_lr` would have no effect, or a number is out of range.
    """
    rates = {"router_lr": router_lr, "weight_decay": weight_decay} | ({} if lr is None else {"lr": lr})
    wrong = {name: value for name, value in rates.items() if not value >= 0}
    if wrong:
        raise ValueError(f"{wrong}: expected numbers of at least 0")
    routers = {id(parameter) for parameter in router_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_routers = [parameter for parameter in trained if id(parameter) in routers]
    if not of_routers:
        reason = "all routers are frozen" if routers else "there is no router: an adapter needs more than one expert"
        raise ValueError(f"router_lr={router_lr} would train nothing: {reason}")
    others = [parameter for parameter in trained if id(parameter) not in routers]
    groups = _by_decay("routers", of_routers, router_lr, weight_decay) + _by_decay("others", others, lr, weight_decay)
    return [group for group in groups if group["params"]]


def _by_decay(name: str, parameters: list[nn.Parameter], lr: float | None, decay: float) -> list[dict[str, Any]]:
    """The matrices, which decay, and the rest, which does not; either may be empty."""
    matrices = [parameter for parameter in parameters if len(_shape(parameter)) > 1]
    rest = [parameter for parameter in parameters if len(_shape(parameter)) < 2]
    rate = {} if lr is None else {"lr": lr}
    return [
        {"name": name, "params": matrices, "weight_decay": decay} | rate,
        {"name": f"{name}_not_decayed", "params": rest, "weight_decay": 0.0} | rate,
    ]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape, where DeepSpeed has split it too."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

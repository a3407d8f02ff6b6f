"""Parameter groups: weight decay by kind of module, own learning rates by part of the model.

Biases and the weights of norms are not decayed. Corresponds to `create_optimizer` in upstream's `llava_trainer.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llava.extension import ParameterGroup
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.train.options import RunArguments

BASE_GROUP = "base"
"""Name of the group of everything that has the run's own learning rate."""


def _undecayed(model: nn.Module) -> set[int]:
    """Identities of biases and norm weights; each kind of decoder has a norm class of its own."""
    norms = (nn.LayerNorm, type(bare_model(model).get_model().norm))
    return {
        id(weight)
        for module in model.modules()
        for name, weight in module.named_parameters(recurse=False)
        if isinstance(module, norms) or name == "bias"
    }


def _special_groups(model: nn.Module, args: RunArguments) -> list[ParameterGroup]:
    """Groups whose learning rate or weight decay differs from the run's."""
    llava, parts = bare_model(model), components(model)
    groups = []
    if args.training.mm_projector_lr is not None:
        projector = list(parts[Component.PROJECTOR].values())
        groups.append(ParameterGroup("projector", projector, args.training.mm_projector_lr))
    if args.training.mm_vision_tower_lr is not None:
        tower = list(parts[Component.VISION_TOWER].values())
        groups.append(ParameterGroup("vision tower", tower, args.training.mm_vision_tower_lr))
    for item in llava.extensions:
        groups += item.extension.parameter_groups(llava, item.config, args)
    return groups


def optimizer_groups(model: nn.Module, args: RunArguments) -> list[dict[str, Any]]:
    """Groups in torch's form, in the order: base, then each special group; decayed before undecayed.

    Args:
        model: LLaVA model or the PEFT model around it, frozen and unfrozen already.
        args: options of the run.

    Returns:
        `params`, `weight_decay`, `lr` and `name` for each group; groups may be empty, as in upstream.
    """
    undecayed = _undecayed(model)
    special = _special_groups(model, args)
    claimed = {id(weight) for group in special for weight in group.parameters}
    rest = [weight for weight in model.parameters() if id(weight) not in claimed]
    groups: list[dict[str, Any]] = []
    for group in [ParameterGroup(BASE_GROUP, rest), *special]:
        rate = args.training.learning_rate if group.learning_rate is None else group.learning_rate
        decay = args.training.weight_decay if group.weight_decay is None else group.weight_decay
        trained = [weight for weight in group.parameters if weight.requires_grad]
        decayed = [weight for weight in trained if id(weight) not in undecayed]
        plain = [weight for weight in trained if id(weight) in undecayed]
        groups.append({"name": group.name, "params": decayed, "weight_decay": decay, "lr": rate})
        groups.append({"name": f"{group.name}, undecayed", "params": plain, "weight_decay": 0.0, "lr": rate})
    return groups

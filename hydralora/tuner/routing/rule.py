"""How the probabilities of a router become the weights of the experts: all of them, the best k, or the best share.

Shape letters: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn


@dataclass(frozen=True)
class Rule:
    """How an adapter weights its experts in one layer; without choices all act by their probability, as in the paper.

    Attributes:
        unit: what is decided for: a token, a sequence or a task.
        temperature: the router's logits are divided by it.
        top_k: the most probable experts that act; None: all.
        top_p: the most probable experts act until their probabilities add up to it; None: all.
        tasks: names of the tasks, of routing by task.
        plain: whether the probabilities of the router or of the tasks are the weights, as they are.
    """

    unit: str
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    tasks: tuple[str, ...] = ()
    plain: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", self.unit != "sequence" and not self.chooses)

    @property
    def chooses(self) -> bool:
        """Whether some experts do not act."""
        return self.top_k is not None or self.top_p is not None

    def weights(self, probabilities: Tensor) -> Tensor:
        """Weights (..., E) of `probabilities` (..., E); those of the chosen experts add up to 1."""
        if not self.chooses:
            return probabilities
        # A stable order, so that experts of equal probability are chosen alike in every batch.
        order = probabilities.detach().argsort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            kept = torch.arange(order.shape[-1], device=order.device).expand_as(order) < self.top_k
        else:
            ordered = probabilities.detach().gather(-1, order)
            kept = ordered.cumsum(dim=-1) - ordered < (self.top_p or 0.0)  # the best one always
        chosen = torch.zeros_like(kept).scatter(-1, order, kept)
        weights = probabilities * chosen
        return weights / weights.sum(dim=-1, keepdim=True)


def rule_of(config: Any) -> Rule:
    """The rule that a configuration asks for."""
    names = tuple(config.tasks or ())
    return Rule(str(config.routing), float(config.router_temperature), config.top_k, config.top_p, names)


def rule_problems(config: Any) -> list[str]:
    """One line for each pair of options that do not go together, of a configuration whose values are right alone."""
    found = []
    if config.top_k is not None and config.top_p is not None:
        found.append(f"top_k {config.top_k} and top_p {config.top_p} are two choices of the experts that act: give one")
    if config.top_k is not None and config.top_k > config.most_experts:
        found.append(f"top_k is {config.top_k}, but there are {config.most_experts} experts")
    if (config.routing == "task") != bool(config.tasks):
        found.append(
            f"routing is '{config.routing}' and tasks is {config.tasks}: routing='task' needs tasks, and only it"
        )
    if config.init == "centered" and (config.top_k or config.top_p):
        found.append("init='centered' needs all experts at the start, where they cancel; leave top_k and top_p out")
    if config.tasks and len(set(config.tasks)) < len(config.tasks):
        found.append(f"tasks {config.tasks} has a name twice")
    return found


def check_patterns(config: Any, model: nn.Module) -> None:
    """Refuse a pattern of `experts_pattern` that means no layer, before anything is replaced.

    Raises:
        ValueError: names the pattern.
    """
    if not config.experts_pattern:
        return
    used = {get_pattern_key(config.experts_pattern.keys(), name) for name, _ in model.named_modules()}
    unused = [pattern for pattern in config.experts_pattern if pattern not in used]
    if unused:
        raise ValueError(
            f"experts_pattern {unused}: no module of the model has such a name, or an earlier pattern has it"
        )

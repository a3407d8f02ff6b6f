"""What a call asks of the routing: weights of the experts, one expert, or the tasks of its rows.

`model(..., routing_weights=w)`, `expert=2` and `tasks=["law", "math"]` are arguments of `forward` and `generate` of an
adapted model. They hold for this call, its thread, and what gradient checkpointing recomputes of it.

Shape letters: B batch, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NAMES = ("routing_weights", "expert", "tasks")
"""The arguments."""


class GivenRoutingError(ValueError):
    """What a call asks of the routing cannot be carried out; the message says what to do."""


@dataclass
class Given:
    """What one call asks for; nothing in particular if all are None.

    Attributes:
        weights: (E,), (B, E) or (B, T, E) float32 weights of the experts.
        expert: () or (B,) or (B, T) int, the only one that acts.
        tasks: numbers or names of the tasks: one, or one per row, or (B, T) numbers.
        shape: (B, T) of the forward pass that runs; None: not known. `calls.py` sets it.
    """

    weights: Tensor | None = None
    expert: Tensor | None = None
    tasks: Any = None
    shape: tuple[int, int] | None = None

    @property
    def rows(self) -> int | None:
        """For how many rows it is; None: the same for all."""
        if isinstance(self.tasks, Tensor):
            tasks = None if self.tasks.ndim == 0 else len(self.tasks)
        else:
            tasks = None if self.tasks is None or isinstance(self.tasks, str | int) else len(self.tasks)
        found = [
            None if self.weights is None or self.weights.ndim == 1 else len(self.weights),
            None if self.expert is None or self.expert.ndim == 0 else len(self.expert),
            tasks,
        ]
        return next((rows for rows in found if rows is not None), None)

    @property
    def forces(self) -> bool:
        """Whether it replaces what the router would decide."""
        return self.weights is not None or self.expert is not None


def present(given: Given | None) -> Given:
    """What holds now, to be in force again when a checkpoint recomputes this."""
    return Given() if given is None else replace(given)


def refuse_blind_recomputation() -> None:
    """Stop a layer that a backward pass recomputes without what its call asked for.

    Raises:
        RuntimeError: a backward pass is under way.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a backward pass recomputes this layer, and does not say what routing its call asked for. Let the model "
            "checkpoint its layers (gradient_checkpointing of the Trainer), or call torch.utils.checkpoint.checkpoint "
            "with context_fn=model.base_model.hydralora_passes.checkpoint_contexts"
        )


def read_given(kwargs: Mapping[str, Any]) -> Given | None:
    """What the arguments of a call ask for; None if nothing.

    Raises:
        GivenRoutingError: they contradict each other, or are no weights, experts or tasks.
    """
    found = {name: kwargs[name] for name in NAMES if kwargs.get(name) is not None}
    if not found:
        return None
    if "routing_weights" in found and "expert" in found:
        raise GivenRoutingError("routing_weights and expert were both given; an expert is a weight of 1, so give one")
    return Given(_weights(found.get("routing_weights")), _expert(found.get("expert")), found.get("tasks"))


def _weights(value: Any) -> Tensor | None:
    if value is None:
        return None
    weights = torch.as_tensor(value)
    if weights.dtype is torch.bool or not 1 <= weights.ndim <= 3 or not weights.numel():
        raise GivenRoutingError(
            f"routing_weights of shape {tuple(weights.shape)} and {weights.dtype}: expected numbers of shape (E,), the "
            "same for all, (rows, E) or (rows, tokens, E)"
        )
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(weights.detach()).all()):
        raise GivenRoutingError("routing_weights has numbers that are not finite")
    return weights.float()


def _expert(value: Any) -> Tensor | None:
    if value is None:
        return None
    expert = torch.as_tensor(value)
    if expert.is_floating_point() or expert.dtype is torch.bool or expert.ndim > 2:
        raise GivenRoutingError(
            f"expert is {value!r}: expected the number of an expert from 0, or one per row or per token of each row"
        )
    return expert.long()


def forced_weights(given: Given, experts: int, adapter_name: str) -> Tensor:
    """The weights that a call forces on a layer: (E,), (B, E) or (B, T, E) float32.

    Args:
        given: what the call asks for; it `forces`.
        experts: E of the layer.
        adapter_name: for messages.

    Raises:
        GivenRoutingError: the layer has another number of experts.
    """
    if given.expert is not None:
        low, high = int(given.expert.min()), int(given.expert.max())
        if low < 0 or high >= experts:
            raise GivenRoutingError(
                f"expert {low if low < 0 else high}: adapter '{adapter_name}' has experts 0 to {experts - 1}"
            )
        return torch.nn.functional.one_hot(given.expert, experts).float()
    if given.weights is None:
        raise GivenRoutingError("the call forces no weights")
    if given.weights.shape[-1] != experts:
        raise GivenRoutingError(
            f"routing_weights has {given.weights.shape[-1]} weights, but a layer of adapter '{adapter_name}' has "
            f"{experts} experts"
        )
    return given.weights


def task_numbers(given: Given | None, known: tuple[str, ...], adapter_name: str) -> Tensor:
    """The tasks that a call names, as numbers: (), (B,) or (B, T).

    Args:
        given: what the call asks for.
        known: names of the adapter's tasks, in the order of its table.
        adapter_name: for messages.

    Raises:
        GivenRoutingError: none was named, or one that the adapter does not know.
    """
    tasks = None if given is None else given.tasks
    if tasks is None:
        raise GivenRoutingError(
            f"adapter '{adapter_name}' routes by task: give each call tasks=, the names or numbers of the tasks of its "
            f"rows or one for all (known: {list(known)}), or weights by routing_weights= or expert=. Code that "
            "checkpoints layers itself needs context_fn=model.base_model.hydralora_passes.checkpoint_contexts"
        )
    if isinstance(tasks, Tensor):
        numbers = tasks
    else:
        rows = [tasks] if isinstance(tasks, str | int) else list(tasks)
        unknown = [task for task in rows if isinstance(task, str) and task not in known]
        if unknown:
            raise GivenRoutingError(f"adapter '{adapter_name}' has no task {unknown}; known: {list(known)}")
        numbers = torch.tensor([known.index(task) if isinstance(task, str) else task for task in rows])
        numbers = numbers[0] if isinstance(tasks, str | int) else numbers
    if numbers.is_floating_point() or numbers.dtype is torch.bool or numbers.ndim > 2 or not numbers.numel():
        raise GivenRoutingError(f"tasks of shape {tuple(numbers.shape)} and {numbers.dtype}: expected names or numbers")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= len(known):
        raise GivenRoutingError(
            f"adapter '{adapter_name}' has no task {low if low < 0 else high}; it has {len(known)}: {list(known)}"
        )
    return numbers.long()


def for_tokens(values: Tensor, x: Tensor, shape: tuple[int, int] | None, rows: Tensor | None) -> Tensor:
    """Weights that broadcast to those of the tokens of a layer's input.

    A generation multiplies rows (beams, several answers), each one next to its copies; the weights follow.

    Args:
        values: (E,), (B, E) or (B, T, E).
        x: (B, T, in_features), (B, in_features), or (B * T, in_features) where a model flattens a batch.
        shape: (B, T) of the pass, if known.
        rows: which rows of the batch `x` has; None: all.

    Returns:
        (1, ..., E), (B, 1, E), (B, T, E) or (B * T, E), on the device of `x`.

    Raises:
        GivenRoutingError: the input's rows or tokens are not those of the call.
    """
    values = values.to(x.device)
    if values.ndim == 1:
        return values.view(*[1] * (x.ndim - 1), -1)
    tokens = None if values.ndim == 2 else values.shape[1]
    batch = len(x) if rows is None else None if shape is None else shape[0]
    flat = x.ndim == 2 and shape is not None and len(x) == shape[0] * shape[1] and rows is None
    if flat and shape is not None:
        batch = shape[0]
    known = batch is not None and (shape is None or batch == shape[0]) and batch % len(values) == 0
    length = shape[1] if flat and shape is not None else x.shape[1] if x.ndim == 3 else None
    if not known or batch is None or (tokens is not None and tokens != length):
        raise GivenRoutingError(
            f"weights for {len(values)} rows{'' if tokens is None else f' of {tokens} tokens'} were given, but this "
            f"layer sees {tuple(x.shape[:-1])} tokens in a batch of {shape or 'another shape'}: give one row per row "
            "of the batch, or one vector for all"
        )
    values = values.repeat_interleave(batch // len(values), dim=0)
    if rows is not None:
        values = values[rows.to(values.device)]
    if flat and shape is not None:
        return values.flatten(0, 1) if tokens is not None else values.repeat_interleave(shape[1], dim=0)
    return values if tokens is not None or x.ndim == 2 else values[:, None]

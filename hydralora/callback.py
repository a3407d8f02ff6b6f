"""A callback of transformers' Trainer that logs the numbers of `diagnostics.py` and warns of routers that do not work.

    Trainer(..., callbacks=[RoutingCallback()])

It observes only updates that end in a line of the log, so the others cost nothing, and waits for the device once for
each line.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from hydralora.diagnostics import ROUTING, matrices, mean_cosine, routing_numbers, whole
from hydralora.layer import RoutedModule, Routing
from hydralora.log import add_values, give_to_trainers, remove_values
from hydralora.model import routed_modules
from hydralora.tokens import RealTokens, entries, real_tokens

PASSES = 8
"""Forward passes of an update that are kept, the last ones."""
PREFIX = "routing_of/"
COLLAPSED = 1.1
"""A router with fewer effective experts has collapsed."""
MOVED = 1e-3
"""A router that moved less, as a fraction of its norm, has not moved."""

logger = logging.getLogger("hydralora")


class RoutingCallback(TrainerCallback):
    """Logs how the layers with a router route, and warns of dead experts, collapsed and unmoved routers.

    Every line about training gets `routing_of/<number>`, the mean over the layers, and `routing_of/<layer>/<number>`
    for each; the numbers are those of `diagnostics.py`, over the tokens of this process. Where FSDP splits the weights
    over processes, `cosine` and `moved` are left out.

    Args:
        per_module: log each layer too.
        warn_after: updates before the first warning.
    """

    def __init__(self, per_module: bool = True, warn_after: int = 20) -> None:
        self.per_module, self.warn_after = per_module, warn_after
        self._modules: dict[str, RoutedModule] = {}
        self._seen: dict[str, deque[tuple[Tensor, RealTokens]]] = {}
        self._observers: dict[str, partial[None]] = {}
        self._handles: list[RemovableHandle] = []
        self._start: dict[str, list[Tensor]] = {}
        self._tokens = RealTokens()
        self._values: dict[str, float] = {}
        self._warned: set[tuple[str, str]] = set()
        give_to_trainers()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Find the layers, and keep their routers as they are.

        Raises:
            ValueError: the model has no layer with a router.
        """
        self._modules = {
            name: module for name, module in routed_modules(model).items() if max(_experts(module), default=1) > 1
        }
        if not self._modules:
            raise ValueError(f"RoutingCallback: {type(model).__name__} has no layer with a router of several experts")
        with whole(list(self._modules.values())):
            for name, module in self._modules.items():
                found = matrices(module)
                if found is not None:
                    self._start[name] = [router.detach().clone() for router in found[0]]
        for module in entries(model, self._modules):
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
        add_values(model, self._pop)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe the update if a line of the log follows it, or may follow."""
        self._stop()
        step = state.global_step + 1
        by_steps = str(getattr(args.logging_strategy, "value", args.logging_strategy)) == "steps"
        first = step == 1 and args.logging_first_step
        if not by_steps or first or step % max(1, state.logging_steps) == 0:
            self._seen = {name: deque(maxlen=PASSES) for name in self._modules}
            self._observers = {name: partial(self._note, name) for name in self._modules}
            for name, module in self._modules.items():
                module.observers.append(self._observers[name])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if a line of the log follows."""
        self._stop()
        if control.should_log:
            self._measure(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """Add the values, unless the Trainer's standard callbacks have done so, before the loggers."""
        if "loss" in logs and self._values:
            logs |= (found := self._pop())
            if state.log_history:
                state.log_history[-1] |= found

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Leave nothing on the model."""
        self._stop()
        while self._handles:
            self._handles.pop().remove()
        remove_values(model, self._pop)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = real_tokens(module, args, kwargs) if self._observers else RealTokens()
        if tokens.known and not tokens.refusal:
            self._tokens = tokens

    def _note(self, name: str, routing: Routing) -> None:
        if torch._C._current_graph_task_id() == -1:  # not recomputed by gradient checkpointing
            self._seen[name].append((routing.probabilities.detach(), self._tokens))

    def _stop(self) -> None:
        for name, observer in self._observers.items():
            self._modules[name].observers.remove(observer)
        self._observers = {}

    def _pop(self) -> Mapping[str, float]:
        values, self._values = self._values, {}
        return values

    def _measure(self, step: int) -> None:
        """Compute the values of all layers and fetch them at once."""
        numbers = self._of_routing()
        limits: dict[str, Tensor] = {}
        with whole(list(self._modules.values())):
            for name in numbers.keys() & self._start.keys():
                found = matrices(self._modules[name])
                if found is not None and len(found[0]) == len(self._start[name]):
                    pairs = list(zip(found[0], self._start[name], strict=True))
                    numbers[name]["cosine"] = mean_cosine(found[1])
                    numbers[name]["moved"] = torch.stack([(new - old).norm() for new, old in pairs]).norm().float()
                    limits[name] = MOVED * torch.stack([old.norm() for _, old in pairs]).norm().float()
        keys = [(name, number) for name, of_layer in numbers.items() for number in of_layer]
        tensors = [numbers[name][number] for name, number in keys] + list(limits.values())
        if not keys:
            return
        device = tensors[0].device
        fetched = torch.stack([tensor.detach().to(device) for tensor in tensors]).tolist()
        values = {key: value for key, value in zip(keys, fetched, strict=False)}
        for number in dict.fromkeys(number for _, number in keys):
            found_values = [value for (_, of), value in values.items() if of == number]
            self._values[PREFIX + number] = sum(found_values) / len(found_values)
        if self.per_module:
            self._values |= {f"{PREFIX}{_short(name)}/{number}": value for (name, number), value in values.items()}
        if step >= self.warn_after:
            self._warn(values, dict(zip(limits, fetched[len(keys) :], strict=True)))

    def _of_routing(self) -> dict[str, dict[str, Tensor]]:
        """The numbers of `ROUTING` by layer, of all layers with the same tokens and experts in the same operations."""
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name, passes in self._seen.items():
            alike.setdefault(tuple((p.shape, p.device, id(tokens)) for p, tokens in passes), []).append(name)
        numbers: dict[str, dict[str, Tensor]] = {}
        for of_passes, names in alike.items():
            routed, valid = [], []
            for number, (shape, device, _) in enumerate(of_passes):
                routed.append(torch.stack([self._seen[name][number][0] for name in names]).flatten(1, -2))
                valid.append(self._seen[names[0]][number][1].of(shape[:-1], device).flatten())
            if routed:
                found = iter(routing_numbers(torch.cat(routed, dim=1), torch.cat(valid)).flatten().unbind())
                numbers |= {name: {number: next(found) for number in ROUTING} for name in names}
        return {name: numbers[name] for name in self._seen if name in numbers}

    def _warn(self, values: Mapping[tuple[str, str], float], limits: Mapping[str, float]) -> None:
        """One line for each kind of trouble, with the layers that have it for the first time."""
        found = {
            "dead experts (their mean weight is below a tenth of an equal share)": [
                name for (name, number), value in values.items() if number == "dead" and value > 0
            ],
            "a collapsed router (one expert takes nearly everything)": [
                name for (name, number), value in values.items() if number == "effective" and value < COLLAPSED
            ],
            "a router that has not moved from its start; is it among the optimizer's parameters?": [
                name for name, limit in limits.items() if values[name, "moved"] <= limit
            ],
        }
        for trouble, names in found.items():
            new = [name for name in names if (trouble, name) not in self._warned]
            self._warned |= {(trouble, name) for name in new}
            if new:
                shown = ", ".join(map(_short, new[:3])) + (", ..." if len(new) > 3 else "")
                logger.warning("%d of %d layers have %s: %s", len(new), len(self._modules), trouble, shown)


def _experts(module: RoutedModule) -> list[int]:
    """Numbers of experts of a layer, one for each adapter that it has."""
    experts: Any = module.experts
    return list(experts.values()) if isinstance(experts, dict) else [experts]


def _short(name: str) -> str:
    """The name of a layer in the base model."""
    return name.removeprefix("module.").removeprefix("base_model.model.")

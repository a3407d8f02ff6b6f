"""Values that join the lines about training in the log of transformers' Trainer, of whatever class the trainer is.

A callback that the user hands over comes after the loggers (wandb, TensorBoard), which then do not see what it adds.
So one of the Trainer's standard callbacks adds the values, before any logger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import TrainerCallback

Values = Callable[[], Mapping[str, float]]
"""Hands out values since the last call."""

_SOURCES: WeakKeyDictionary[nn.Module, list[Values]] = WeakKeyDictionary()


def add_values(model: nn.Module, values: Values) -> None:
    """Let `values` join the lines about the training of `model`, until `remove_values`."""
    _SOURCES.setdefault(model, []).append(values)


def remove_values(model: nn.Module, values: Values) -> None:
    """Take back `add_values`."""
    if values in _SOURCES.get(model, []):
        _SOURCES[model].remove(values)


class LogCallback(TrainerCallback):
    """Adds what `add_values` registered to a line with the loss of training."""

    def on_log(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Add to the line, for the loggers that come later, and to the history, which has it already."""
        if "loss" not in logs:
            return
        for values in _SOURCES.get(model, []):
            found = values()
            logs |= found
            if state.log_history:
                state.log_history[-1] |= found


def give_to_trainers(*callbacks: type[TrainerCallback]) -> None:
    """Add callbacks to those of every Trainer that is made from now on; what was added already stays once."""
    from transformers import trainer

    for callback in (LogCallback, *callbacks):
        if callback not in trainer.DEFAULT_CALLBACKS:
            trainer.DEFAULT_CALLBACKS.append(callback)

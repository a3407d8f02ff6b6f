"""What an adapter has to be told by transformers' Trainer, and what it tells its log.

A trainer knows into how many micro batches an update is divided and how its loss is scaled; the losses on the routing
need both. With the first adapter that has such a loss the Trainer's standard callbacks get one that hands them over, so
that every trainer built on it, TRL's among them, needs nothing. Other loops call `set_gradient_scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hydralora.log import add_values, remove_values
from hydralora.tuner.balance.auxiliary import AuxiliaryLosses, losses_of
from hydralora.tuner.balance.gradient_scale import GradientScale
from hydralora.tuner.progress import set_step


def set_gradient_scale(model: nn.Module, micro_batches: int = 1, scaler: Any = None) -> None:
    """Say how a training loop scales its loss, so that the losses on the routing are scaled alike.

    Not needed with transformers' Trainer and what is built on it.

    Args:
        model: with HydraLoRA adapters, wrapped or not.
        micro_batches: by how many the loop divides the loss of each, since their gradients are added up.
        scaler: the `torch.amp.GradScaler` by which it multiplies the loss, or None.

    Raises:
        ValueError: `micro_batches` is below 1, or the model has no HydraLoRA adapter.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches}, expected at least 1")
    found = losses_of(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no HydraLoRA adapter, whose losses could be scaled")
    for losses in found:
        losses.scale = GradientScale(micro_batches, scaler)


class AdapterCallback(TrainerCallback):
    """Hands the scale of the loss to the losses on the routing, and their values to the log."""

    def __init__(self) -> None:
        self._losses: list[AuxiliaryLosses] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Find the adapters."""
        self._losses = losses_of(model)
        for losses in self._losses:
            add_values(model, losses.pop)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Before the first micro batch of an update."""
        set_step(model, state.global_step)
        if not self._losses:
            return
        optimizer = kwargs.get("optimizer")
        # One process that feeds several devices adds up the gradients of their copies.
        micro_batches = micro_batches_of_update(args, state, kwargs.get("train_dataloader")) * max(1, args.n_gpu)
        for losses in self._losses:
            losses.scale = GradientScale(micro_batches, getattr(optimizer, "scaler", None), _loss_scale(optimizer))

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Loops of the caller's own start from no scale."""
        for losses in self._losses:
            remove_values(model, losses.pop)
            losses.scale = GradientScale()
        self._losses = []


def micro_batches_of_update(args: Any, state: Any, batches: Any) -> int:
    """How many micro batches the update that begins has: fewer than the others at the end of an epoch.

    Args:
        args: of the Trainer.
        state: of the Trainer.
        batches: its loader of training data; without a length all updates are taken for full.
    """
    full = args.gradient_accumulation_steps
    try:
        length = len(batches)
    except TypeError:
        return full
    updates = max(1, -(-length // full))
    last = state.global_step % updates == updates - 1
    return (length - (updates - 1) * full) if last and length else full


def _loss_scale(optimizer: Any) -> Callable[[], float] | None:
    """The scale of the loss of DeepSpeed's float16 optimizer, as a function; None for others."""
    inner = getattr(optimizer, "optimizer", None)
    return (lambda: float(inner.cur_scale)) if isinstance(getattr(inner, "cur_scale", None), int | float) else None

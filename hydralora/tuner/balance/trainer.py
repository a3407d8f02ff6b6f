"""What an adapter has to be told by transformers' Trainer, and what it tells its log.

A trainer knows into how many micro batches an update is divided and how its loss is scaled; the losses on the routing
need both. With the first adapter that has such a loss the Trainer's standard callbacks get one that hands them over, so
that every trainer built on it, TRL's among them, needs nothing. Other loops call `set_gradient_scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hydralora.log import add_values, remove_values
from hydralora.tuner.balance.auxiliary import AuxiliaryLosses, losses_of
from hydralora.tuner.balance.gradient_scale import GradientScale
from hydralora.tuner.progress import set_step

STORED = "balance_means"
"""Name of the running means in the Trainer's state."""


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


class AdapterCallback(TrainerCallback, ExportableState):
    """Hands the scale of the loss to the losses on the routing, and their values to the log.

    The running means of `balance_ema` are part of the Trainer's state (`trainer_state.json`), one for each process.
    """

    def __init__(self) -> None:
        self._losses: list[AuxiliaryLosses] = []
        self._gathered: list[dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; called by the process that writes it alone, after all were asked."""
        found = [self._means()] if self._gathered is None else self._gathered
        self._gathered = None
        return {"args": {}, "attributes": {STORED: found if any(found) else []}}

    def _means(self) -> dict[str, Any]:
        """The running means of this process, by adapter and layer."""
        found = {name: terms.shares.state for losses in self._losses for name, terms in losses.adapters.items()}
        return {name: means for name, means in found.items() if means}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Find the adapters, and take up the running means of the checkpoint from which the run resumes."""
        self._losses = losses_of(model)
        for losses in self._losses:
            add_values(model, losses.pop)
        # The Trainer saves the state of a callback only where there was one, and a checkpoint may be older than this.
        empty = {"args": {}, "attributes": {STORED: []}}
        stored = state.stateful_callbacks.setdefault(type(self).__name__, empty)
        stored = stored if state.global_step else None
        means = stored["attributes"].get(STORED) if isinstance(stored, dict) else None
        # Of another number of processes, each takes one of those that there were.
        own = means[args.process_index % len(means)] if means else {}
        for losses in self._losses:
            for name, terms in losses.adapters.items():
                terms.shares.state = own.get(name, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before what may be a checkpoint: the means of all processes, of which one writes them all."""
        self._gathered = None
        moving = any(terms.shares.decay for losses in self._losses for terms in losses.adapters.values())
        # With `save_strategy="best"` it is the evaluation that decides whether to save.
        if (control.should_save or control.should_evaluate) and moving and args.world_size > 1:
            self._gathered = gather_object([self._means()])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after an update."""
        self.on_step_end(args, state, control)

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

"""How many updates have been made: what an adapter does from a certain update on depends on it.

Nothing of it is stored: the Trainer's own count, which a resumed run continues, is handed to the model before each
update (`balance/trainer.py`). Every model keeps the number for itself.
"""

from __future__ import annotations

from torch import nn

from hydralora.tuner.balance.auxiliary import losses_of
from hydralora.tuner.parts import Experts


def set_step(model: nn.Module, step: int) -> None:
    """Say how many updates of `model` have been made, before the next one.

    Args:
        model: with HydraLoRA adapters, wrapped or not.
        step: 0 before the first update.

    Raises:
        ValueError: `step` is negative.
    """
    if step < 0:
        raise ValueError(f"step is {step}, expected the number of updates so far, at least 0")
    for module in model.modules():
        if isinstance(module, Experts):
            module.head_dropout.step = step
    for losses in losses_of(model):
        losses.step = step

"""By what the gradient of an auxiliary loss is multiplied, so that it joins that of a loss which a trainer scales.

A trainer divides its loss by the number of micro batches of an update, and multiplies it against underflow in float16.
Nothing in the gradients that arrive at a layer tells this, so it is said: by a callback that transformers' Trainer gets
with the first adapter that needs it, or by `set_gradient_scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class GradientScale:
    """How the loss of the present micro batch is scaled.

    Attributes:
        micro_batches: of the present update; the auxiliary losses are averaged over them.
        scaler: a `torch.amp.GradScaler`, or None.
        factor: what else the loss is multiplied by, asked for in each backward pass; None: nothing.
    """

    micro_batches: float = 1
    scaler: Any = None
    factor: Callable[[], float] | None = None

    def number(self) -> float:
        """By what the gradient of an auxiliary loss is multiplied, apart from the scaler."""
        return (1.0 if self.factor is None else float(self.factor())) / self.micro_batches

    def of(self, gradient: Tensor) -> Tensor:
        """The gradient of an auxiliary loss, scaled; does not wait for the device."""
        number = self.number()
        return self.with_scaler(gradient * number if number != 1 else gradient)

    def with_scaler(self, gradient: Tensor) -> Tensor:
        """A gradient, multiplied as the scaler multiplies the loss; does not wait for the device."""
        return self.scaler.scale(gradient) if self._scales else gradient

    @property
    def _scales(self) -> bool:
        return self.scaler is not None and self.scaler.is_enabled()

    def check(self, device: torch.device) -> None:
        """Refuse float16 autocast without a scaler, whose scale would be divided out of a gradient without it.

        Raises:
            RuntimeError: says how to name the scaler.
        """
        kind = device.type
        halved = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
        if halved and self.scaler is None and self.factor is None:
            raise RuntimeError(
                "the gradient of a balance loss must be scaled as the loss is, and autocast computes in float16 "
                "without a scaler that is known here: call hydralora.set_gradient_scale(model, scaler=scaler), with "
                "torch.amp.GradScaler(enabled=False) if the loss is not scaled"
            )

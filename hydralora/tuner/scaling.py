"""Making an adapter stronger or weaker after training: the methods of LoRA's layers, and a context for a whole model.

`peft.helpers.rescale_adapter_scale` sees LoRA alone; `rescale` here does the same for HydraLoRA, and for LoRA too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def checked_factor(value: Any) -> float:
    """A factor of a scale.

    Raises:
        TypeError: it is not a number.
        ValueError: it is NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"scale is {value!r}, a {type(value).__name__}; pass a number")
    if not math.isfinite(value):
        raise ValueError(f"scale is {value!r}, expected a finite number")
    return float(value)


class ScaledLayer(BaseTunerLayer):
    """Mixin of a tuner layer whose adapters have a factor.

    Attributes:
        scaling: factor of each adapter's update, by its name; a tensor () in a model prepared for hot-swapping.
        trained_scaling: that of the configuration.
    """

    scaling: dict[str, float]
    trained_scaling: dict[str, float]
    merged_adapters: list[str]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the factor be `scale` times that of the configuration; nothing happens without this adapter.

        Raises:
            TypeError: `scale` is not a number.
            ValueError: it is not finite, or the adapter is merged.
        """
        if adapter in self.scaling:
            self._rescale(adapter, checked_factor(scale) * self.trained_scaling[adapter])

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters by `scale`; errors as of `set_scale`."""
        factor = checked_factor(scale)
        for adapter in self._active_here():
            self._rescale(adapter, factor * self.scaling[adapter])

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active adapters by `scale`; None: take those of the configuration again.

        Raises:
            TypeError: `scale` is not a number.
            ValueError: it is 0 or not finite, or an adapter is merged.
        """
        divisor = None if scale is None else checked_factor(scale)
        if divisor == 0:
            raise ValueError("scale is 0, by which nothing can be divided; pass None to restore the trained scale")
        for adapter in self._active_here():
            before = self.scaling[adapter]
            self._rescale(adapter, self.trained_scaling[adapter] if divisor is None else before / divisor)

    def _active_here(self) -> list[str]:
        return [adapter for adapter in self.active_adapters if adapter in self.scaling]

    def _rescale(self, adapter: str, scaling: float) -> None:
        if adapter in self.merged_adapters:
            raise ValueError(
                f"adapter '{adapter}' is merged with scale {self.scaling[adapter]:g}; call unmerge_adapter() first"
            )
        self.put_scaling(adapter, scaling)

    def put_scaling(self, adapter: str, scaling: float) -> None:
        """Set the factor; a tensor is filled in place, so that a compiled model stays compiled."""
        present: Any = self.scaling.get(adapter)
        if isinstance(present, Tensor):
            present.fill_(scaling)
        else:
            self.scaling[adapter] = scaling


@contextmanager
def rescale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the factors of all adapters, HydraLoRA's and LoRA's, within a `with` block; 0 is the base.

    Args:
        model: with such adapters.
        multiplier: a number.

    Raises:
        TypeError: `multiplier` is not a number.
        ValueError: it is not finite, the model has no such adapter, or one of them is merged.
    """
    factor = checked_factor(multiplier)
    layers = [module for module in model.modules() if isinstance(module, ScaledLayer | LoraLayer)]
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no HydraLoRA and no LoRA layers to rescale")
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"adapters {merged} are merged, and keep their scale; call unmerge_adapter() first")
    before = [layer.scaling for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = {name: value * factor for name, value in scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling

"""What a model with predictors knows beside its weights, and on which transformers it can be used."""

from __future__ import annotations

from torch import Tensor

from dynamic.config import SparseConfig, SparseOptions
from dynamic.statistics import KeepStatistics
from dynamic.training import TemperatureSchedule

ATTRIBUTE = "dynamic_sparsity"
"""Where a model keeps its `Sparsity`."""

TRIED = "4.37"


class Sparsity:
    """What a model with predictors knows beside its weights.

    Args:
        settings: of the predictors.
    """

    def __init__(self, settings: SparseConfig) -> None:
        self.settings = settings
        self.schedule = TemperatureSchedule(SparseOptions.gumbel_start_tau, SparseOptions.gumbel_end_tau)
        self.statistics = KeepStatistics()
        self.losses: dict[str, Tensor] = {}

    def metrics(self) -> dict[str, float]:
        """Temperature, kept shares since the last call, and the weighted losses of the last pass of this process."""
        losses = {f"{name}_loss": float(loss) for name, loss in self.losses.items()}
        values = {**losses, **self.statistics.pop(), "tau": self.schedule.tau}
        return {name: round(value, 4) for name, value in values.items()}


def check_transformers() -> None:
    """Raise `ValueError` if transformers is not of the version whose decoder loop is replaced."""
    from transformers import __version__

    if not __version__.startswith(f"{TRIED}."):
        raise ValueError(f"Dynamic-LLaVA is carried for transformers {TRIED}; installed is {__version__}")

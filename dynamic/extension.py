"""Dynamic-LLaVA as an extension of llava: the predictors, their flags, and what happens at the sparse layer.

Corresponds to `train_sparse.py`, `dynamic_llava_trainer.py` and `dynamic_llava_llama.py` of the original. With labels
tokens are masked, by a policy that attention obeys from the sparse layer on; without, they are dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from dynamic import model as sparse_model
from dynamic.config import SparseConfig, SparseOptions
from llava.errors import CheckpointError, FlagError
from llava.extension import Config, Extension

if TYPE_CHECKING:
    from llava.train.arguments import RunArguments


class DynamicExtension(Extension):
    """Predictors that drop tokens; the configuration is `SparseConfig.to_dict()`, the original's `sparse_config`."""

    name = "dynamic"
    options = SparseOptions

    def configure(self, args: RunArguments) -> Config | None:
        """The configuration of the predictors if `--dynamic` is on.

        Raises:
            FlagError: a value is refused, or an option is given that nothing carries out.
        """
        options: SparseOptions = args.options[self.name]
        if not options.dynamic:
            _refuse_idle_options(options)
            return None
        try:
            return options.config().to_dict()
        except ValueError as error:
            raise FlagError(f"{error} (the flags have the same names)") from error

    def attach(self, model: nn.Module, config: Config) -> None:
        """Add the predictors; their parameters are float32 whatever the base is.

        Raises:
            CheckpointError: the configuration is damaged, or the decoder is too shallow.
        """
        try:
            sparse_model.attach(model, SparseConfig.from_dict(config))
        except ValueError as error:
            raise CheckpointError(f"extension '{self.name}': {error}") from error

    def named_parameters(self, model: nn.Module, config: Config) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the predictors."""
        return sparse_model.added_parameters(model)


def _refuse_idle_options(options: SparseOptions) -> None:
    """Raise if an option was given that nothing carries out while `--dynamic` is off."""
    idle = [
        f"--{option.name} {getattr(options, option.name)}"
        for option in dataclasses.fields(options)
        if getattr(options, option.name) != option.default
    ]
    if idle:
        raise FlagError(f"{', '.join(idle)}: without effect while --dynamic is off; pass --dynamic True")

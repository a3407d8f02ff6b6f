"""One adapter for each row of a batch (`adapter_names`), for one call.

A generation multiplies rows, by `num_beams` or `num_return_sequences`, and an encoder runs before it does; so the names
are repeated by what a layer sees, whatever settings have led to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydralora.tuner.calls.inputs import DECODER, token_shape


@contextmanager
def adapters_by_row(
    model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Hand `adapter_names` to every layer of `model` in the calls of this thread; nothing stays behind.

    Args:
        model: the host.
        names: one for each row of the call's inputs.
        args: positional arguments of the call of `forward` or `generate`.
        kwargs: its other arguments.

    Raises:
        ValueError: there are more or fewer names than rows.
    """
    shape = token_shape(args, kwargs) or token_shape((), kwargs, DECODER)
    if shape is not None and shape[0] != len(names):
        raise ValueError(f"{len(names)} adapter names for {shape[0]} rows; give one per row")
    names_of = NamesOfRows(list(names))
    handles = []
    try:
        for module in model.modules():
            if module is model or isinstance(module, PreTrainedModel):
                handles.append(module.register_forward_pre_hook(names_of.enter, with_kwargs=True))
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(names_of.hand_over, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class NamesOfRows:
    """The names of one call, for the rows of each layer in it.

    Attributes:
        names: one for each row of the call's inputs.
        shape: (B, T) of the model that runs; None: not known.
    """

    def __init__(self, names: list[str]) -> None:
        self.names, self.shape = names, (len(names), 0)
        self._thread = threading.get_ident()  # in another thread another batch may be under way

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a model: how many rows it has."""
        if threading.get_ident() == self._thread:
            self.shape = token_shape((), kwargs, DECODER) or token_shape(args, kwargs) or self.shape

    def hand_over(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a layer: its argument `adapter_names`, one for each of its rows."""
        if threading.get_ident() != self._thread:
            return args, kwargs
        x = args[0] if args else next(iter(kwargs.values()), None)
        return args, kwargs | {"adapter_names": self._of(x) if isinstance(x, Tensor) else self.names}

    def _of(self, x: Tensor) -> list[str]:
        """Names of the rows of `x` (rows, ...), or (rows * T, D) where a model flattens a batch."""
        rows, tokens = self.shape
        repeats, rest = divmod(len(x), len(self.names))
        if rest or len(x) not in ((rows, rows * tokens) if x.ndim == 2 else (rows,)):
            return self.names  # the layer says that these are not its rows
        return [name for name in self.names for _ in range(repeats)]

"""Counts the operations for which the host waits for the device, on any device: on a GPU each would stop the queue.

What counts: a tensor that becomes a number, a truth value, a list or an array; an operation whose output's shape
depends on values (`nonzero`, `masked_select`, `unique`, an index by a boolean mask, as a source or as a destination);
a copy from another device to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy"}
"""What reads the values of a tensor without any operation, if it is on the CPU."""


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATIONS:
            self.found.append(name)
        indices = args[1] if name in INDEXING else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.found.append(f"{name} by a mask")
        target = (kwargs or {}).get("device")
        if name == "_to_copy" and target is not None and torch.device(target).type == "cpu" != args[0].device.type:
            self.found.append("copy to the CPU")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.found.append(METHODS[func])
        return func(*args, **(kwargs or {}))


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """Yields a list that what is waited for in the block is put on, by name."""
    found: list[str] = []
    with _Operations(found), _Methods(found):
        yield found

"""What a machine can do at best, measured in the run that is compared with it: products a second, bytes a second.

A floor is the larger of two times: operations at the rate of a matrix product as wide as the model's, and bytes at the
rate at which a matrix is read for one vector. No program with the same operations and bytes is faster.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

REPEATS = 5

READ = 2**28
"""Bytes that are read; more than caches hold."""


@dataclass(frozen=True)
class Rates:
    """The best of several tries, in computing time of the thread.

    Attributes:
        flops: floating-point operations a second, of a product of matrices.
        bytes: bytes a second that a product with one vector reads.
    """

    flops: float
    bytes: float

    def floor(self, flops: float, read: float = 0.0) -> float:
        """Seconds that so many operations and bytes take at least."""
        return max(flops / self.flops, read / self.bytes)

    def record(self) -> dict[str, Any]:
        """As the record has it."""
        return asdict(self)


def measure_rates(rows: int, width: int, inner: int, dtype: torch.dtype) -> Rates:
    """Rates of this thread, or of all threads if torch has several: the clock is then the wall's.

    Args:
        rows: of the left matrix, positions of a batch.
        width: D.
        inner: M.
        dtype: of both matrices.
    """
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(inner, width).to(dtype)
    product = _best(x, weight)
    table = torch.full((-(-READ // (width * dtype.itemsize)), width), 0.5, dtype=dtype)
    reading = _best(x[:1], table)
    return Rates(2 * rows * width * inner / product, table.numel() * table.element_size() / reading)


@torch.inference_mode()
def _best(x: Tensor, weight: Tensor) -> float:
    """Seconds of `x @ weight.T`."""
    read = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(REPEATS):
        start = read()
        torch.nn.functional.linear(x, weight)
        seconds.append(read() - start)
    return max(min(seconds), 1e-9)

"""How fast a run trains: samples and target tokens per second, peak memory, and the time that is left.

Counts of all processes are added up. Evaluations and the writing of checkpoints are left out of the rates, and are part
of the time that is left, since they will come again. A resumed run counts from where it resumed.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX

SAMPLES, TARGETS, MEMORY, LEFT = "samples_per_second", "target_tokens_per_second", "peak_memory_gib", "seconds_left"
"""Keys of a line of the log."""

GIB = 2**30


def shifted_targets(labels: Tensor) -> Tensor:
    """Number of trained tokens, int64 scalar, of labels (B, T): the first position of a row is never predicted."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that this process has had in use: tensors on a GPU, or all of its memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, and KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SpeedMeter:
    """Counts what this process trains on; see the module.

    Args:
        device: of the process.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self.device, self._clock = device, clock
        self._began: tuple[int, float] | None = None  # updates that had been made, and when
        self._line_began = 0.0
        self._paused = 0.0
        self._samples = 0
        self._targets = torch.zeros((), dtype=torch.int64)
        self.all_samples = 0

    def begin(self, update: int) -> None:
        """Start the clock, if it is not running, after `update` updates."""
        if self._began is None:
            self._began = (update, self._clock())
            self._line_began = self._began[1]

    def add(self, samples: int, targets: Tensor) -> None:
        """Count a micro batch of this process. Does not wait for the device."""
        self._samples += samples
        self.all_samples += samples
        self._targets = self._targets.to(targets.device) + targets

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out of the rates."""
        before = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - before

    def line(self, gather: Callable[[Tensor], Tensor], update: int, last: int) -> dict[str, float]:
        """What a line of the log says, since the line before; all processes must ask. Empty before `begin`.

        Args:
            gather: from (1, 3) int64 of each process to (processes, 3).
            update: updates that have been made.
            last: updates of the whole run.
        """
        if self._began is None:
            return {}
        here = [self._samples, int(self._targets), peak_memory(self.device)]
        everywhere = gather(torch.tensor([here], dtype=torch.int64, device=self.device))  # (processes, 3)
        samples, targets = everywhere[:, :2].sum(0).tolist()
        memory = int(everywhere[:, 2].max())
        now = self._clock()
        seconds = max(now - self._line_began - self._paused, 1e-9)
        found = {
            SAMPLES: round(samples / seconds, 3),
            TARGETS: round(targets / seconds, 3),
            MEMORY: round(memory / GIB, 3),
        }
        first, began = self._began
        if update > first:
            found[LEFT] = round((now - began) / (update - first) * max(0, last - update), 3)
        self._samples, self._targets, self._line_began, self._paused = 0, torch.zeros_like(self._targets), now, 0.0
        return found

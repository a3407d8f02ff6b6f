"""Peaks of a process's memory as Linux counts it: private pages, and pages of files that are mapped."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import torch

from llava.runtime.monitoring.speed import peak_memory

STATUS = Path("/proc/self/status")
FIELDS = {"resident": "VmRSS", "private": "RssAnon", "mapped_files": "RssFile"}
"""Names in records, and in `STATUS`."""

SECONDS = 0.05
"""Between two looks."""


def process_status() -> dict[str, int]:
    """Bytes by the names of `STATUS`; nothing where Linux does not tell."""
    if not STATUS.is_file():
        return {}
    lines = (line.split() for line in STATUS.read_text(encoding="utf-8").splitlines())
    return {words[0].removesuffix(":"): 1024 * int(words[1]) for words in lines if words[2:] == ["kB"]}


def memory_now() -> dict[str, int]:
    """Bytes by kind; nothing where Linux does not tell."""
    found = process_status()
    return {name: found[field] for name, field in FIELDS.items() if field in found}


class PeakMemory:
    """Looks at the memory of this process while it is open, in a thread of its own.

    Attributes:
        peaks: the most bytes of each kind; not all of them at the same moment.
    """

    def __init__(self) -> None:
        self.peaks = memory_now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        for name, size in memory_now().items():
            self.peaks[name] = max(self.peaks.get(name, 0), size)

    def record(self) -> dict[str, int]:
        """The peaks, and the largest resident size that the system has seen of this process in all its life."""
        return self.peaks | {"resident_in_all": peak_memory(torch.device("cpu"))}

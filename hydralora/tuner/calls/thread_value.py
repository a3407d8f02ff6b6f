"""A value that every thread has for itself, which torch.compile can trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class OfThread(Generic[T]):
    """A value that every thread has for itself; a copy of this object has none.

    Tracing knows no threads: what is set and taken back within one trace is kept in an attribute.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, T] = {}
        self._traced: T | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_by_thread": {}, "_traced": None}

    def get(self) -> T | None:
        """The value, or None."""
        if self._traced is not None:
            return self._traced
        return self._by_thread.get(threading.get_ident()) if self._by_thread else None

    def put(self, value: T | None) -> None:
        """Set the value; None removes it."""
        if torch.compiler.is_compiling():
            self._traced = value
        elif value is None:
            self._by_thread.pop(threading.get_ident(), None)
        else:
            self._by_thread[threading.get_ident()] = value

    @property
    def place(self) -> T | None:
        """What `put` would replace here: while tracing, a value from before the trace is not touched."""
        return self._traced if torch.compiler.is_compiling() else self._by_thread.get(threading.get_ident())

    @property
    def outside(self) -> bool:
        """Whether a thread has a value that was not set while tracing."""
        return bool(self._by_thread)

    @contextmanager
    def holding(self, value: T | None) -> Iterator[None]:
        """The value within a block; the one before comes back afterwards."""
        before = self.place
        self.put(value)
        try:
            yield
        finally:
            self.put(before)

"""Images read ahead of the model: a queue of prompts that gives batches of changing size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")

BATCHES_AHEAD = 2
"""Batches whose images are read while the model works."""


class Prefetcher(Generic[Item, Loaded]):
    """Items in order, each with what a function loads for it in the background.

    Args:
        items: in the order in which they are taken.
        load: called in threads; its errors are raised by `take`.
        workers: number of threads.
    """

    def __init__(self, items: Iterable[Item], load: Callable[[Item], Loaded], workers: int) -> None:
        self._waiting = deque(items)
        self._reading: deque[tuple[Item, Future[Loaded]]] = deque()
        self._load = load
        self._pool = ThreadPoolExecutor(max_workers=max(1, workers))

    def __bool__(self) -> bool:
        """True while there is something to take."""
        return bool(self._reading or self._waiting)

    def take(self, count: int) -> list[tuple[Item, Loaded]]:
        """The next `count` items, fewer at the end."""
        self._read_up_to(count * (1 + BATCHES_AHEAD))
        batch = [self._reading.popleft() for _ in range(min(count, len(self._reading)))]
        return [(item, future.result()) for item, future in batch]

    def put_back(self, batch: Sequence[tuple[Item, Loaded]]) -> None:
        """Return what `take` gave to the front of the queue."""
        for item, loaded in reversed(batch):
            future: Future[Loaded] = Future()
            future.set_result(loaded)
            self._reading.appendleft((item, future))

    def _read_up_to(self, count: int) -> None:
        while self._waiting and len(self._reading) < count:
            item = self._waiting.popleft()
            self._reading.append((item, self._pool.submit(self._load, item)))

    def __enter__(self) -> Prefetcher[Item, Loaded]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

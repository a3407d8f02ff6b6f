"""The page decodes a few uploads at a time, whoever sends them."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llava.serve.page import handlers
from llava.serve.page.handlers import DECODED_AT_ONCE, Handlers


def test_uploads_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock, now, most, done = threading.Lock(), 0, 0, []

    def slow(image: object, folder: object) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
            done.append(image)
        if image == "broken":
            raise ValueError
        return b"", image

    monkeypatch.setattr(handlers, "read_upload", slow)
    page = Handlers(None, tmp_path, None)  # type: ignore[arg-type]

    async def all_at_once() -> list[Any]:
        names = ["broken"] * DECODED_AT_ONCE + [str(number) for number in range(3 * DECODED_AT_ONCE)]
        return await asyncio.gather(*(page._read(name) for name in names), return_exceptions=True)

    results = asyncio.run(all_at_once())
    assert most == DECODED_AT_ONCE
    assert len(done) == len(results) == 4 * DECODED_AT_ONCE
    assert sum(isinstance(each, ValueError) for each in results) == DECODED_AT_ONCE

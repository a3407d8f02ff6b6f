"""The server of the load test: a process of its own, and what it uses of the machine (Linux)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

START_SECONDS = 120


class Usage(NamedTuple):
    """What a process uses: resident memory, threads, open files and connections."""

    megabytes: float
    threads: int
    files: int

    def most(self, other: Usage) -> Usage:
        """The larger of each."""
        return Usage(*map(max, self, other))


NOTHING = Usage(0, 0, 0)


def usage(process: int) -> Usage:
    """What a process of this machine uses now."""
    place = Path(f"/proc/{process}")
    status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
    return Usage(int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), len(os.listdir(place / "fd")))


@contextmanager
def running_server(module: str, options: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """A server on a free port: its address without a path, and the number of its process.

    Args:
        module: `python -m` of it.
        options: of its command line, without the port.
        log: file for what it prints.
    """
    command = [sys.executable, "-u", "-m", module, *options, "--host", "127.0.0.1", "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield _address(process, log), process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that a server prints, when it answers there."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
        if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1", log.read_text()):
            with suppress(httpx.ConnectError):  # it has its port before it listens
                httpx.get(f"{found[1]}/health", timeout=60)
                return found[1]
    raise AssertionError(f"the server does not start:\n{log.read_text()}")

"""Our server and `transformers serve` under the same clients: questions about images by OpenAI's chat API, wall clock.

Both servers run at the same time and are asked in turns; one that waits takes no computing time.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measuring import Clock, quotient, spread, take_turns
from benchmarks.peer_models import Pair, check_equal, tasks_of
from llava.errors import FlagError
from llava.eval.answering.answers import Task

OURS, PEER = "llava.serve.api", "transformers serve"
COMMAND = Path(sys.executable).with_name("transformers")
START_SECONDS = 180
REQUEST_SECONDS = 600


@dataclass(frozen=True)
class Server:
    """A server that is ready.

    Attributes:
        address: ends in `/v1`.
        model: the name that requests give.
    """

    address: str
    model: str

    def ask(self, client: httpx.Client, task: Task, images: Path, tokens: int) -> str:
        """The answer to a question.

        Raises:
            FlagError: the server refuses.
        """
        image = base64.b64encode((images / task.images[0]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": task.question},
        ]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": tokens,
        }
        answer = client.post(f"{self.address}/chat/completions", json=request, timeout=REQUEST_SECONDS)
        if answer.status_code != 200:
            raise FlagError(f"{self.address} answers {answer.status_code}: {answer.text[:500]}")
        return str(answer.json()["choices"][0]["message"]["content"]).strip()

    def answers(self, tasks: Sequence[Task], images: Path, tokens: int, clients: int) -> list[str]:
        """All answers, `clients` questions at a time."""
        with httpx.Client(trust_env=False) as client, ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda task: self.ask(client, task, images, tokens), tasks))


@contextlib.contextmanager
def started(words: Sequence[str], log: Path, address: Callable[[str], str | None]) -> Iterator[str]:
    """A server as a process; ends with the block.

    Args:
        words: command.
        log: gets what it prints.
        address: finds where it serves in what it has printed so far, once it can be asked.

    Raises:
        FlagError: it ended, or did not answer in time; holds its last lines.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while (found := address(log.read_text(encoding="utf-8"))) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise FlagError(f"{words[1:4]} does not serve: {log.read_text(encoding='utf-8')[-500:]}")
            time.sleep(0.2)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def ours(pair: Pair, work: Path) -> Iterator[Server]:
    """Our server on a free port."""
    words = [sys.executable, "-m", "llava.serve.api", "--model-path", str(pair.ours), "--device", "cpu", "--port", "0"]

    def address(printed: str) -> str | None:
        found = re.search(r"at (http://\S+/v1)", printed)
        return None if found is None else found[1]

    with started([*words, "--torch-dtype", "float32"], work / "ours.log", address) as found:
        yield Server(found, httpx.get(f"{found}/models", trust_env=False).json()["data"][0]["id"])


@contextlib.contextmanager
def theirs(pair: Pair, work: Path) -> Iterator[Server]:
    """Transformers' server; its default answers one request at a time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(COMMAND), "serve", str(pair.theirs), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]

    def address(_: str) -> str | None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return f"http://127.0.0.1:{port}/v1"
        return None

    with started([*words, "--dtype", "float32"], work / "theirs.log", address) as found:
        yield Server(found, str(pair.theirs))


def measure(
    pair: Pair, work: Path, tokens: int, clients: int, requests: int, clock: Clock, rounds: int
) -> dict[str, Any]:
    """Answers a second for a number of clients, each with so many requests.

    Raises:
        FlagError: answers differ, or a server does not start.
    """
    if not COMMAND.is_file():
        return {"left_out": {PEER: f"{COMMAND} is not installed"}}
    tasks = tasks_of(pair, clients * requests)
    answers: dict[str, list[str]] = {}
    with ours(pair, work) as here, theirs(pair, work) as there:
        servers = {OURS: here, PEER: there}

        def asked(name: str) -> Callable[[], None]:
            def run() -> None:
                answers[name] = servers[name].answers(tasks, pair.images, tokens, clients)

            return run

        ways: dict[str, Callable[[], object]] = {name: asked(name) for name in servers}
        # A round that is not timed shows whether both answer the same.
        for way in ways.values():
            way()
        check_equal(f"answers for {clients} clients", answers[OURS], answers[PEER])
        times = take_turns(ways, clock, rounds, warmup=0)
    return {
        "clients": clients,
        "tokens": tokens,
        "requests_of_a_client": requests,
        "answers_per_second": {name: spread([len(tasks) / each for each in values]) for name, values in times.items()},
        "peer_over_ours": quotient(times[PEER], times[OURS]),
    }

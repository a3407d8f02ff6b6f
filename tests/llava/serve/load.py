"""Many clients at once: each gets its own answers and no other, memory and the queue stay bounded.

    python -m tests.llava.serve.load --seconds 120 --clients 64

starts `python -m llava.serve.api` on a tiny model and a free port of this machine, asks each question once, alone, and
then lets all clients ask at the same time: at once and as a stream, with and without images, greedy and sampled. In
between they go away in the middle of a request or of an answer, and send requests that must be refused. It prints the
counts and ends with status 1 if anything is wrong. `test_load.py` runs the same for some seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.golden import golden_dir
from tests.llava.serve.load_clients import MODEL, Client
from tests.llava.serve.load_process import running_server, usage
from tests.llava.serve.load_questions import Question, ask_alone
from tests.llava.serve.load_report import Report, problems

BATCH, WAITING = 8, 16
"""Of the server that is started; more clients than both must be told to come back."""

SERVER = ("--model-path", str(golden_dir("llava") / MODEL), "--device", "cpu", "--temperature", "0")
SERVER += ("--batch-size", str(BATCH), "--max-waiting", str(WAITING))
SETTLE_SECONDS = 30
QUESTIONS = 2
"""For each client: one about an image, one without."""


async def _watch(address: str, process: int, report: Report, warm: float) -> None:
    """Look at the server ten times a second; what it uses until `warm` is the measure of the rest."""
    async with httpx.AsyncClient(base_url=address, timeout=60) as http:
        while True:
            now = usage(process)
            if time.monotonic() < warm:
                report.begin = report.begin.most(now)
            report.peak = report.peak.most(now)
            health = (await http.get("/health")).json()
            report.waiting = max(report.waiting, health["waiting"])
            report.answering = max(report.answering, health["answering"])
            await asyncio.sleep(0.1)


async def _settle(address: str, report: Report) -> None:
    """Wait until the server has nothing to do; nobody waits for an answer any more."""
    idle, until = {"status": "ok", "answering": 0, "waiting": 0}, time.monotonic() + SETTLE_SECONDS
    async with httpx.AsyncClient(base_url=address, timeout=60) as http:
        while (state := (await http.get("/health")).json()) != idle:
            if time.monotonic() > until:
                report.wrong.append(f"{SETTLE_SECONDS} s after all clients have gone the server says {state}")
                return
            await asyncio.sleep(0.05)


async def put_under_load(
    address: str, process: int, questions: Sequence[Question], clients: int, seconds: float
) -> Report:
    """Let clients ask for some seconds; the first third is the warm-up of the server's memory.

    Args:
        address: of the server, without path.
        process: its number, of this machine.
        questions: for all clients, none of them for two.
        clients: number of clients.
        seconds: length of the load.
    """
    report = Report(clients, seconds)
    asking = [Client(number, questions[number::clients], address, report) for number in range(clients)]
    begun = time.monotonic()
    watching = asyncio.create_task(_watch(address, process, report, begun + seconds / 3))
    await asyncio.gather(*(client.run(begun + seconds) for client in asking))
    await _settle(address, report)
    watching.cancel()
    report.end = usage(process)
    return report


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.llava.serve.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120, help="length of the load")
    parser.add_argument("--clients", type=int, default=64, help="clients that ask at the same time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Load a server of its own; the number of problems."""
    args = build_parser().parse_args(argv)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server("llava.serve.api", SERVER, Path(folder) / "log") as (address, process),
    ):
        with httpx.Client(base_url=address, timeout=60) as client:
            questions = ask_alone(client, MODEL, QUESTIONS * args.clients)
        print(f"asked {len(questions)} questions alone", flush=True)
        report = asyncio.run(put_under_load(address, process, questions, args.clients, args.seconds))
    print(report.text())
    found = problems(report, WAITING, BATCH)
    print("\n".join(found) or "nothing is wrong")
    return len(found)


if __name__ == "__main__":
    sys.exit(min(main(), 1))

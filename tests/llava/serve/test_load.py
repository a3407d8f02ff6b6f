"""Many clients at once, for some seconds: nobody gets another's answer, nothing grows. See `load.py` for minutes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.llava.serve.load import BATCH, SERVER, WAITING, put_under_load
from tests.llava.serve.load_clients import MODEL
from tests.llava.serve.load_process import running_server
from tests.llava.serve.load_questions import Question, ask_alone
from tests.llava.serve.load_report import Report, problems

pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytestmark = pytest.mark.slow

CLIENTS, SECONDS = 32, 6.0
Loaded = tuple[str, int, list[Question]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The real server in a process of its own, behind what can break it, and what it answers to one client alone."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server("tests.llava.serve.load_server", SERVER, log) as (address, process):
        with httpx.Client(base_url=address, timeout=60) as client:
            questions = ask_alone(client, MODEL, CLIENTS)
        yield address, process, questions


def load(server: Loaded, seconds: float, fault: str = "none") -> Report:
    address, process, questions = server
    httpx.post(f"{address}/fault/{fault}").raise_for_status()
    try:
        return asyncio.run(put_under_load(address, process, questions, CLIENTS, seconds))
    finally:
        httpx.post(f"{address}/fault/none").raise_for_status()


def test_many_clients(server: Loaded) -> None:
    report = load(server, SECONDS)
    assert problems(report, WAITING, BATCH) == []
    assert report.answering > 1, "answers must be made together"
    # The controls of the two limits: with smaller ones the same run is reported.
    assert any("requests waited" in problem for problem in problems(report, report.waiting - 1, BATCH))
    assert any("memory grew" in problem for problem in problems(report, WAITING, BATCH, report.growth - 0.01))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("keeps-requests", "memory grew by"),
        ("answers-another", "times: another's answer"),
        ("formless-errors", "times: refused"),
    ],
)
def test_faults_are_found(fault: str, found: str, server: Loaded) -> None:
    report = load(server, SECONDS, fault)
    assert any(found in problem for problem in problems(report, WAITING, BATCH)), report

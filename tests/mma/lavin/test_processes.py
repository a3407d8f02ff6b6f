"""Evaluation by several processes, played by threads: uneven shares, interruptions, answers of other settings."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llava.errors import FlagError
from llava.eval.answering.processes import Processes, part_of
from mma.lavin import answering
from mma.lavin import eval as mma_eval
from mma.lavin.scoring.scienceqa import ScienceQAScore
from tests.mma.lavin.lavin_files import LavinFiles
from tests.mma.lavin.test_evaluation import answers_in, words_for

RunProgram = Callable[..., list[ScienceQAScore]]


def play(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What `work` returns in each of `count` threads that wait for each other as processes do."""
    barrier, votes = threading.Barrier(count, timeout=20), {}

    class Played(Processes):
        def wait(self) -> None:
            barrier.wait()

        def any(self, here: bool) -> bool:
            votes[self.rank] = here
            barrier.wait()
            found = any(votes.values())
            barrier.wait()  # nobody votes again before all have counted
            return found

    def run(rank: int) -> Any:
        try:
            return work(Played(rank, count))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, rank) for rank in range(count)]
        errors = [future.exception() for future in futures]
        for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error  # the reason before what follows from it
        return [future.result() for future in futures]


@pytest.fixture
def run(lavin_files: LavinFiles, lavin_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> RunProgram:
    """Evaluate by so many processes: `run(count, folder, *flags)`, the scores of each."""
    here, one_at_a_time = threading.local(), threading.Lock()
    monkeypatch.setattr("llava.eval.answering.processes.joined", lambda: contextlib.nullcontext(here.process))
    load_model = answering.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        with one_at_a_time:  # transformers sets what holds for all threads while it loads
            return load_model(*args, **kwargs)

    monkeypatch.setattr(answering, "load_model", load)

    def work(process: Processes, words: list[str]) -> ScienceQAScore:
        here.process = process
        return mma_eval.main(words)

    def start(count: int, folder: Path, *flags: str) -> list[ScienceQAScore]:
        words = words_for(lavin_files, lavin_checkpoint, folder, *flags)
        if count == 1:
            return [work(Processes(), words)]
        return play(count, lambda process: work(process, words))

    return start


def settings_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "answers.jsonl.run.json").read_text())["settings"]


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model was loaded though there is nothing to ask")


def test_a_process_without_a_question_waits_for_the_others(run: RunProgram, tmp_path: Path) -> None:
    (alone,) = run(1, tmp_path / "one", "--limit", "1")
    assert run(2, tmp_path / "two", "--limit", "1") == [alone, alone]
    assert answers_in(tmp_path / "two") == answers_in(tmp_path / "one")
    assert [part_of(tmp_path / "two" / "answers.jsonl", rank, 2).stat().st_size > 0 for rank in (0, 1)] == [False, True]


@pytest.mark.parametrize("unfinished", [0, 1])
def test_one_process_was_done_when_the_run_was_interrupted(unfinished: int, run: RunProgram, tmp_path: Path) -> None:
    first = run(2, tmp_path, "--limit", "4")
    rows = answers_in(tmp_path)
    part = part_of(tmp_path / "answers.jsonl", unfinished, 2)
    part.write_text(part.read_text().splitlines(keepends=True)[0])
    (tmp_path / "answers.jsonl").unlink()
    assert run(2, tmp_path, "--limit", "4") == first
    assert answers_in(tmp_path) == rows
    assert len(rows) == 4


def test_another_number_of_processes_goes_on(run: RunProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(2, tmp_path, "--limit", "3")
    monkeypatch.setattr(answering, "find_folders", no_model)
    assert run(1, tmp_path, "--limit", "3") == first[:1]
    assert run(2, tmp_path, "--limit", "3") == first


def test_answers_of_other_settings_are_not_scored(run: RunProgram, tmp_path: Path) -> None:
    """Whichever number of processes wrote them, and whichever would go on with them."""
    run(2, tmp_path, "--limit", "2")
    assert settings_in(tmp_path)["seed"] == 0
    for count in (1, 2, 3):
        with pytest.raises(FlagError, match=r"answers\S*\.jsonl holds answers made with other settings .seed: 0 then"):
            run(count, tmp_path, "--limit", "2", "--seed", "1")
    run(2, tmp_path, "--limit", "2", "--seed", "1", "--restart")
    assert settings_in(tmp_path)["seed"] == 1
    run(1, tmp_path, "--limit", "2", "--seed", "1")

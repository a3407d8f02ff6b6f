"""Runs side by side: the table, its intervals, and the page of questions on which they disagree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava.errors import FlagError
from llava.eval import __main__ as engine
from llava.eval import report
from llava.eval.reporting.comparison import Scored, difference, disagreements, group_runs, mean_scores, read_run

Answered = Callable[..., Path]


@pytest.fixture
def answered(folder: Path, checkpoint: Path, say: Callable[[str], None]) -> Answered:
    """The result file of a run in which every question got the same answer."""

    def run(name: str, text: str, model: str, *more: str) -> Path:
        say(text)
        words = [name, "--model-path", str(checkpoint), "--data-dir", str(folder), "--experiment", model, *more]
        answers = Path(engine.main(words)["answers_file"])
        return answers.with_name(f"{answers.stem}.result.json")

    return run


def scored(scores: list[float]) -> Scored:
    rows = {(str(index), 0): {"question_id": index, "score": score} for index, score in enumerate(scores)}
    return Scored(Path("x"), {"model": "m"}, rows)


def test_intervals() -> None:
    """Those of the normal approximation; a paired difference is surer than two separate means."""
    random = np.random.default_rng(0)
    hard = random.random(2000)
    first, second = ((hard < limit).astype(float).tolist() for limit in (0.6, 0.63))
    mean = mean_scores(scored(first))
    assert mean is not None
    error = 100 * np.std(first) / np.sqrt(2000)
    assert mean.value == pytest.approx(100 * np.mean(first))
    # The bootstrap of 10,000 resamples scatters by about a hundredth of the width.
    assert (mean.low, mean.high) == pytest.approx((mean.value - 1.96 * error, mean.value + 1.96 * error), abs=0.15)
    apart = difference(scored(first), scored(second))
    assert apart is not None
    assert 0 < apart.low < apart.value < apart.high
    assert apart.high - apart.low < (mean.high - mean.low) / 2
    assert mean_scores(scored(first)) == mean
    assert mean_scores(scored([])) is None
    assert difference(scored([]), scored(first)) is None


def test_disagreements_come_by_their_size() -> None:
    first, second = scored([1.0, 0.0, 0.3, 0.5]), scored([1.0, 1.0, 0.0, 0.5])
    assert disagreements(first, second) == [("1", 0), ("2", 0)]


def test_table_and_page(answered: Answered, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        answered("pope", "Yes", "always"),
        answered("chartqa", "10.4", "always"),
        answered("pope", "No", "never"),
        answered("chartqa", "nothing", "never"),
        answered("mme", "Yes", "always"),
    ]
    path = report.main([*map(str, results), "--output", str(tmp_path / "out")])
    text, html = (tmp_path / "out" / "report.md").read_text(), path.read_text()
    assert text in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {read_run(result).result['title']} ({read_run(result).result['split']})" for result in results[:2]
    ] + [f"## MME ({read_run(results[4]).result['split']})"]
    metrics = [read_run(result).result["metrics"]["accuracy"] for result in (results[0], results[2])]
    assert f"| accuracy | {metrics[0]:.2f} | {metrics[1]:.2f} ({metrics[1] - metrics[0]:+.2f}) |" in text
    assert re.search(r"\| difference \| - \| -?\d+\.\d\d \[", text)
    always, never = read_run(results[0]), read_run(results[2])
    count = len(disagreements(always, never))
    assert count == len(always.samples) > 0, "one of them is wrong on every question"
    assert f"always and never disagree on {count} questions" in html
    assert html.count("<img ") >= count
    assert html.count('class="answer better"') == count + len(disagreements(*(read_run(results[i]) for i in (1, 3))))
    assert "http" not in html


def test_few_samples_without_images(answered: Answered, folder: Path, tmp_path: Path) -> None:
    """What the runs wrote is enough then; with images the questions must be where they were."""
    results = [str(answered("pope", text, text)) for text in ("Yes", "No")]
    questions = Path(read_run(Path(results[0])).result["arguments"]["question_file"])
    questions.rename(questions.with_suffix(".moved"))
    with pytest.raises(FlagError, match=r"no longer at .*--no-images"):
        report.main([*results, "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    page = report.main([*results, "--output", str(tmp_path), "--no-images", "--samples", "1"]).read_text()
    assert "<img" not in page
    assert page.count('class="question"') == 1
    assert "questions, 1 shown" in page


def test_what_differs_is_said(answered: Answered, tmp_path: Path) -> None:
    whole, part = answered("pope", "Yes", "whole"), answered("pope", "Yes", "part", "--limit", "2", "--seed", "3")
    (group,) = group_runs([read_run(whole), read_run(part)])
    notes = " ".join(group.notes)
    assert "numbers of questions differ" in notes
    assert "`seed` differs: 0, 3" in notes
    assert "not the whole benchmark" in notes


def test_refused(answered: Answered, tmp_path: Path) -> None:
    result = answered("pope", "Yes", "one")
    with pytest.raises(FlagError, match="twice"):
        report.main([str(result), str(result), "--output", str(tmp_path)])
    other = tmp_path / "other.result.json"
    other.write_text(json.dumps({"benchmark": "pope"}))
    with pytest.raises(FlagError, match=r"other\.result\.json: lacks .*no result of python -m llava\.eval"):
        report.main([str(other), "--output", str(tmp_path)])

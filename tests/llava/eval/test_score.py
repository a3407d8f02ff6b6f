"""The scorer: known answers, and that what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError
from llava.eval import score

QUESTIONS = [
    {"question_id": 0, "text": "?", "category": "count", "label": "2"},
    {"question_id": 1, "text": "?", "category": "count", "label": "3"},
    {"question_id": "e0", "text": "?", "category": "exist", "label": "Yes"},
    {"question_id": "e1", "text": "?", "category": "exist", "label": "No"},
    {"question_id": "e2", "text": "?", "category": "exist", "label": "No"},
]
TEXTS = {0: " 2.\n", 1: "4", "e0": "yes", "e1": "NO.", "e2": "No, there is none."}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(texts: dict[Any, str]) -> list[dict[str, Any]]:
    return [{"question_id": key, "text": text, "model_id": "tiny"} for key, text in texts.items()]


def files(folder: Path, questions: list[dict[str, Any]], rows: list[dict[str, Any]]) -> tuple[Path, Path]:
    return write(folder / "q.jsonl", questions), write(folder / "a.jsonl", rows)


def test_known_scores_by_category(tmp_path: Path) -> None:
    scores = score.report(*files(tmp_path, QUESTIONS, answers(TEXTS)))["scores"]
    assert list(scores) == ["count", "exist", "all"]
    assert [(s["n"], s["correct"], s["accuracy"]) for s in scores.values()] == [(2, 1, 0.5), (3, 2, 2 / 3), (5, 3, 0.6)]
    assert [s["majority"] for s in scores.values()] == [0.5, 2 / 3, 0.6]  # all: 1 of count, 2 of exist


def test_the_order_of_the_answers_is_of_no_importance(tmp_path: Path) -> None:
    backwards = dict(reversed(TEXTS.items()))
    there = score.report(*files(tmp_path, QUESTIONS, answers(TEXTS)))["scores"]
    assert score.report(*files(tmp_path, QUESTIONS, answers(backwards)))["scores"] == there


def test_exchanged_answers_score_differently(tmp_path: Path) -> None:
    exchanged = TEXTS | {"e0": TEXTS["e1"], "e1": TEXTS["e0"]}
    scores = score.report(*files(tmp_path, QUESTIONS, answers(exchanged)))["scores"]
    assert scores["exist"]["correct"] == 0
    assert scores["count"]["correct"] == 1


@pytest.mark.parametrize("text", ["Yes", "yes", " YES. ", "yes.\n", "yes ."])
def test_forgiven(text: str) -> None:
    assert score.normalize(text) == score.normalize("Yes")


@pytest.mark.parametrize("text", ["", ".", "yes..", ".yes", "yes!", "y es", "yes, it is", "no"])
def test_not_forgiven(text: str) -> None:
    assert score.normalize(text) != score.normalize("Yes")


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_known_values(correct: int, n: int, low: float, high: float) -> None:
    assert score.wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert score.wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


ROWS = answers(TEXTS)
MISFITS = {
    "missing": (QUESTIONS, ROWS[:3], ["2 questions have no answer: 'e1', 'e2'", "3 answers do not fit 5 questions"]),
    "duplicate": (QUESTIONS, [*ROWS, ROWS[1]], ["1 question ids are answered more than once: 1"]),
    "unknown": (QUESTIONS, answers(TEXTS | {"zz": "a"}), ["1 answers belong to no question: 'zz'"]),
    "another type": (QUESTIONS, answers(TEXTS | {"0": "2"}), ["1 question ids are answered more than once: 0"]),
    "questions of two types": (
        [*QUESTIONS, QUESTIONS[0] | {"question_id": str(QUESTIONS[0]["question_id"])}],
        ROWS,
        ["1 question ids appear more than once in the question file: 0"],
    ),
    "duplicate questions": ([*QUESTIONS, QUESTIONS[0]], ROWS, ["more than once in the question file: 0"]),
    "both at once": (QUESTIONS, [*ROWS[1:], ROWS[1]], ["have no answer: 0", "answered more than once: 1"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_answers_that_do_not_fit_are_named(tmp_path: Path, case: str) -> None:
    questions, rows, messages = MISFITS[case]
    with pytest.raises(BadSampleError) as error:
        score.report(*files(tmp_path, questions, rows))
    for message in messages:
        assert message in str(error.value)


def test_long_lists_of_ids_are_shortened(tmp_path: Path) -> None:
    questions = [{"question_id": number, "text": "?", "label": "a"} for number in range(25)]
    with pytest.raises(BadSampleError, match=r"25 questions have no answer: 0, 1, 2, .*, 9 and 15 more"):
        score.report(*files(tmp_path, questions, []))


def test_a_question_without_label_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"q\.jsonl:1: the row has no 'label'"):
        score.report(*files(tmp_path, [{"question_id": 0, "text": "?"}], answers({0: "a"})))


def test_a_category_must_not_look_like_the_total(tmp_path: Path) -> None:
    question = {"question_id": 0, "text": "?", "label": "a", "category": "all"}
    with pytest.raises(BadSampleError, match="category 'all'"):
        score.report(*files(tmp_path, [question], answers({0: "a"})))


def test_program_prints_the_table_and_writes_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question_file, answers_file = files(tmp_path, QUESTIONS, answers(TEXTS))
    flags = ["--question-file", str(question_file), "--answers-file", str(answers_file)]
    result = score.main([*flags, "--output", str(tmp_path / "out" / "score.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "score.json").read_text()) == result
    for part in ("tiny", "count", "exist", "all", "66.67", "20.8 - 93.9"):
        assert part in printed
    assert {"python", "torch", "transformers", "peft", "llava-extensions"} <= result["versions"].keys()
    assert result["model_ids"] == ["tiny"]

    score.main(flags)
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :]) == result

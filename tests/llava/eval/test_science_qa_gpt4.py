"""ScienceQA by two models: lines and files of the original programs, on answers that need no guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval import eval_science_qa_gpt4 as gpt4
from llava.eval import eval_science_qa_gpt4_requery as requery
from tests.llava.eval.benchmark_data import write_json, write_lines

OURS = ("A", "B", "B", "A", "A", "B", "A")
GPT4 = ("A", "A", None, None, "B", "B", "A")
REQUERY = ("A", "B", None, "B", "B", None, "absent")
"""Letters by question, whose right answers are A, B, A, B, ...; None: the answer states none."""

# Printed by upstream's programs at commit c121f04 on these files.
GPT4_LINES = (
    "Total: 7, Correct: 3, Accuracy: 42.86%",
    "Total: 7, Correct (upper): 5, Accuracy: 71.43%",
    "Total: 7, GPT-4 NO-ANS (RANDOM): 2, Percentage: 28.57%",
)
REQUERY_LINES = (
    "Total: 7, Our-Correct: 5, Accuracy: 71.43%",
    "Total: 7, GPT-4 NO-ANS (RANDOM): 2, Percentage: 28.57%",
    "Total: 7, GPT-4-OursVisual-Correct: 3, Accuracy: 42.86%",
    "Total: 7, Requery-Correct: 5, Accuracy: 71.43%",
)
"""Two further lines of upstream's depend on guesses, which it draws without a seed."""
GUESSED = {
    ("Total: 7, GPT-4-Correct: 3, Accuracy: 42.86%", "Total: 7, Correct upper: 5, Accuracy: 71.43%"),
    ("Total: 7, GPT-4-Correct: 4, Accuracy: 57.14%", "Total: 7, Correct upper: 6, Accuracy: 85.71%"),
    ("Total: 7, GPT-4-Correct: 5, Accuracy: 71.43%", "Total: 7, Correct upper: 7, Accuracy: 100.00%"),
}
"""GPT-4 guesses on questions 2 and 3, which the model answers wrongly."""


def said(letter: str | None) -> str:
    return f"Some words. The answer is {letter}. Because." if letter else "The answer is A. The answer is B."


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    problems = {
        str(n): {"choices": ["w", "x", "y", "z"][: 2 + n % 3], "answer": n % 2, "question": f"Q{n}"} for n in range(8)
    }
    write_json(tmp_path / "problems.json", problems)
    write_json(tmp_path / "pid_splits.json", {"test": [str(n) for n in range(7)], "train": ["7"], "empty": []})
    write_lines(
        tmp_path / "ours.jsonl",
        [{"question_id": str(n), "prompt": f"P{n}", "text": said(letter)} for n, letter in enumerate(OURS)],
    )
    write_json(tmp_path / "gpt4.json", {"outputs": {str(n): said(letter) for n, letter in enumerate(GPT4)}})
    write_lines(
        tmp_path / "requery.jsonl",
        [{"question_id": str(n), "text": said(letter)} for n, letter in enumerate(REQUERY) if letter != "absent"],
    )
    return [
        *("--base-dir", str(tmp_path), "--gpt4-result", str(tmp_path / "gpt4.json")),
        *("--our-result", str(tmp_path / "ours.jsonl")),
    ]


def more(folder: Path) -> list[str]:
    return ["--requery-result", str(folder / "requery.jsonl"), "--output-result", str(folder / "result.json")]


def test_gpt4_first(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    gpt4.main(argv)
    assert tuple(capsys.readouterr().out.splitlines()) == GPT4_LINES


def test_gpt4_decides(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = requery.main([*argv, *more(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:5] == [
        "Question (A): P4",
        f"Our (A): {said('A')}",
        f"GPT-4 (B): {said('B')}",
        f"Requery (B): {said('B')}",
    ]
    printed = lines[-6:]
    assert (printed[0], *printed[2:5]) == REQUERY_LINES
    assert (printed[1], printed[5]) in GUESSED
    # The bytes that upstream writes.
    expected = {"acc": 500 / 7, "correct": 5, "count": 7}
    expected |= {"results": {"0": 0, "1": 1, "2": 1, "3": 1, "4": 1, "5": 1, "6": 0}, "outputs": {}}
    assert (tmp_path / "result.json").read_text() == json.dumps(expected, indent=2)
    assert result == expected


def test_guesses_follow_the_seed(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for seed in range(12):
        outputs = []
        for _ in range(2):
            requery.main([*argv, *more(tmp_path), "--seed", str(seed)])
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]
        seen.add(tuple(outputs[0].splitlines()[-5::4]))
    assert len(seen) > 1
    assert seen <= GUESSED


def test_questions_that_one_file_lacks(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (tmp_path / "ours.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ours.jsonl").write_text("".join(rows[:3]))
    with pytest.raises(BadSampleError, match=r"ours\.jsonl: 3 answers .*4 questions have no answer: '3', .*--lenient"):
        gpt4.main(argv)
    assert not capsys.readouterr().out
    counts = gpt4.main([*argv, "--lenient"])
    assert counts["total"] == 3
    assert capsys.readouterr().out.startswith("4 of 7 questions are not answered in both files and left out\n")
    with pytest.raises(BadSampleError, match=r"ours\.jsonl: 3 answers do not fit 7 .*: '3', '4', '5', '6'"):
        requery.main([*argv, *more(tmp_path)])
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "ours.jsonl").write_text("")
    with pytest.raises(BadSampleError, match=r"ours\.jsonl: 0 answers do not fit 7 questions"):
        gpt4.main([*argv, "--lenient"])


@pytest.mark.parametrize("name", ["ours", "requery"])
def test_answers_to_other_questions(name: str, argv: list[str], tmp_path: Path) -> None:
    """Ids may be numbers; an answer to a question of another split, or a second one, is refused."""
    path = tmp_path / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [row | {"question_id": int(row["question_id"])} for row in rows])
    requery.main([*argv, *more(tmp_path)])
    write_lines(path, [*rows, rows[0] | {"question_id": 0}, rows[0] | {"question_id": "7"}])
    with pytest.raises(BadSampleError, match="answered more than once: '0'; 1 answers belong to no question: '7'"):
        requery.main([*argv, *more(tmp_path)])


def test_an_answer_of_gpt4_that_is_missing(argv: list[str], tmp_path: Path) -> None:
    write_json(tmp_path / "gpt4.json", {"outputs": {str(n): said("A") for n in (0, 1, 2, 3, 5, 6, 7)}})
    for run in (lambda: gpt4.main(argv), lambda: requery.main([*argv, *more(tmp_path)])):
        with pytest.raises(BadSampleError, match=r"gpt4\.json: .*1 questions have no answer: '4'"):
            run()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gpt4.json", "[]", r"gpt4\.json: expected a JSON dict"),
        ("gpt4.json", "{}", r"gpt4\.json: the row has no 'outputs'"),
        ("gpt4.json", '{"outputs": {"1": null}}', r"gpt4\.json: outputs: '1' must be str"),
        ("ours.jsonl", '{"question_id": "1"}\n', r"ours\.jsonl:1: the row has no 'text'"),
        ("problems.json", "{}", r"problems\.json: lacks 7 questions of the split, first '0'"),
        ("pid_splits.json", '{"test": []}', r"no questions in split 'test'"),
    ],
)
def test_broken_files_are_named(name: str, content: str, message: str, argv: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadSampleError, match=message):
        gpt4.main(argv)


def test_no_input_is_overwritten(argv: list[str], tmp_path: Path) -> None:
    before = (tmp_path / "gpt4.json").read_bytes()
    with pytest.raises(FlagError, match="is also --gpt4-result"):
        requery.main([*argv, *more(tmp_path)[:-1], str(tmp_path / "gpt4.json")])
    assert (tmp_path / "gpt4.json").read_bytes() == before

"""MME and GQA: scores worked out by hand, and files that the benchmarks' own programs would refuse."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from llava.errors import BadSampleError
from llava.eval import eval_gqa, eval_mme
from llava.eval.eval_mme import parse_response

# Two images, each with two questions; after the arrow what counts: right, right, right (prefix), wrong (other).
COUNT = "a.jpg\tQ1\tYes\tYes\na.jpg\tQ2\tNo\tno\nb.jpg\tQ1\tYes\tYes, there is\nb.jpg\tQ2\tNo\tI see none\n"
CODE = "c.png\tQ1\tYes\tNope\nc.png\tQ2\tNo\tNope\n"


def folder(path: Path, files: dict[str, str]) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def test_mme_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = folder(tmp_path / "results", {"count.txt": COUNT, "code_reasoning.txt": CODE})
    scores = eval_mme.main(["--results_dir", str(results), "--output", str(tmp_path / "mme.json"), "--lenient"])
    assert scores["count"] == eval_mme.TaskScore(images=2, accuracy=0.75, accuracy_plus=0.5, other=1)
    assert scores["code_reasoning"] == eval_mme.TaskScore(images=1, accuracy=0.5, accuracy_plus=0.0, other=0)
    assert eval_mme.totals(scores) == {"Perception": 125.0, "Cognition": 50.0}
    printed = capsys.readouterr().out
    assert "total score: 125.0  (some tasks missing)" in printed
    assert "count  score: 125.0  acc: 75.00  acc+: 50.00" in printed
    assert json.loads((tmp_path / "mme.json").read_text())["tasks"]["count"]["score"] == 125.0


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("YES", "yes"),
        ("no.", "no"),
        ("Not at all", "no"),
        ("know", "no"),
        (" Yes", "yes"),
        ("It is, yes", "other"),
        ("", "other"),
    ],
)
def test_mme_responses(text: str, parsed: str) -> None:
    assert parse_response(text) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (COUNT + "c.jpg\tQ1\tYes\tYes\n", "5 lines; every image must have exactly two"),
        (COUNT.replace("b.jpg\tQ2", "c.jpg\tQ2"), "pair 2 is about two images, 'b.jpg' and 'c.jpg'"),
        (COUNT.replace("\tYes, there", " Yes, there"), r"count\.txt:3: 3 columns"),
        (COUNT.replace("Q2\tNo\tno", "Q2\tNone\tno"), r"count\.txt:2: the ground truth is 'None'"),
    ],
)
def test_mme_refuses_broken_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=message):
        eval_mme.evaluate(folder(tmp_path / "results", {"count.txt": text}), lenient=True)


def test_mme_refuses_unknown_tasks(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=r"has files of \['colour'\]"):
        eval_mme.evaluate(folder(tmp_path / "results", {"colour.txt": COUNT}))


def test_from_answers_to_mme_scores(tmp_path: Path) -> None:
    """Ground truths beside the images or in a folder of their own; a question with two blanks is found, too."""
    data = folder(tmp_path / "data", {})
    folder(data / "count", {"a.txt": "Two?  Please answer yes or no.\tYes\nThree? Please answer yes or no.\tNo\n"})
    folder(data / "artwork", {})
    folder(data / "artwork" / "questions_answers_YN", {"x.txt": "Old? Please answer yes or no.\tNo\n"})
    suffix = "Please answer yes or no.\nAnswer the question using a single word or phrase."
    rows = [
        ("count/a.jpg", f"Two? {suffix}", "Yes"),
        ("count/a.jpg", f"Three? {suffix}", "No\tand\nmore"),
        ("artwork/x.jpg", "Old?\nAnswer the question using a single word or phrase.", "yes"),
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": key, "prompt": prompt, "text": text}) + "\n" for key, prompt, text in rows)
    )
    convert = importlib.import_module("scripts.convert_mme_for_eval").main
    argv = ["--data-dir", data, "--result-file", answers, "--output-dir", tmp_path / "out"]
    convert([str(word) for word in argv])
    assert (tmp_path / "out" / "count.txt").read_text() == (
        "a.txt\tTwo?  Please answer yes or no.\tYes\tYes\na.txt\tThree? Please answer yes or no.\tNo\tNo and more\n"
    )
    assert (tmp_path / "out" / "artwork.txt").read_text() == "x.txt\tOld? Please answer yes or no.\tNo\tyes\n"
    answers.write_text(answers.read_text().replace("Two?", "Four?"))
    with pytest.raises(BadSampleError, match=r"answers\.jsonl:1: .* has no question 'Four\? Please"):
        convert([str(word) for word in argv])


QUESTIONS = {
    "1": {"answer": "yes", "isBalanced": True, "types": {"structural": "verify"}},
    "2": {"answer": "left", "isBalanced": True, "types": {"structural": "choose"}},
    "3": {"answer": "chair", "isBalanced": True, "types": {"structural": "query"}},
    "4": {"answer": "dog", "isBalanced": False, "types": {"structural": "query"}},
}


def gqa(folder: Path, predictions: object) -> eval_gqa.GQAScore:
    (folder / "q.json").write_text(json.dumps(QUESTIONS))
    (folder / "p.json").write_text(json.dumps(predictions))
    argv = ["--questions", str(folder / "q.json"), "--predictions", str(folder / "p.json")]
    return eval_gqa.main([*argv, "--output", str(folder / "score.json")])


def predictions(**texts: str) -> list[dict[str, str]]:
    return [{"questionId": key.removeprefix("q"), "prediction": text} for key, text in texts.items()]


def test_gqa_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = gqa(tmp_path, predictions(q1="yes", q2="right", q3="chair", q4="cat"))
    assert (score.n, score.accuracy, score.binary, score.open) == (3, 2 / 3, 0.5, 1.0)
    assert score.by_type == {"choose": 0.0, "query": 1.0, "verify": 1.0}
    assert "Accuracy: 66.67%" in capsys.readouterr().out
    assert json.loads((tmp_path / "score.json").read_text())["accuracy"] == 2 / 3
    assert gqa(tmp_path, predictions(q1="Yes", q2="left.", q3="a chair")).accuracy == 0.0


def test_gqa_finds_ids_that_are_numbers(tmp_path: Path) -> None:
    rows = [row | {"questionId": int(row["questionId"])} for row in predictions(q1="yes", q2="left", q3="chair")]
    assert gqa(tmp_path, rows).accuracy == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (predictions(q1="yes", q2="left"), "1 questions have no answer: '3'"),
        (
            predictions(q1="yes", q2="left", q3="chair") + predictions(q1="no"),
            "1 question ids are answered more than once: '1'",
        ),
        (predictions(q1="yes", q2="left", q3="chair", q9="a"), "1 answers belong to no question: '9'"),
        ([{"questionId": True, "prediction": "yes"}], "entry 1 must have 'questionId' and the text 'prediction'"),
        ({"1": "yes"}, "expected a JSON list, found dict"),
    ],
)
def test_gqa_refuses_what_its_program_refuses(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match=message):
        gqa(tmp_path, content)

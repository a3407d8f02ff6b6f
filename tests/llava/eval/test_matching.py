"""Answers to other questions, or to fewer than all: every scorer and converter says so, fails, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval import eval_mme, eval_pope, eval_qbench, summarize_gpt_review
from llava.eval.reporting.comparison import group_runs, read_run
from llava.eval.scoring import sqa_to_llava
from llava.eval.scoring.matching import Sides, by_id, check_fit, id_of, misfits
from tests.llava.eval import benchmark_data
from tests.llava.eval.benchmark_data import write_json, write_lines
from tests.llava.eval.scorers import MME, SCORERS, of_qbench, of_review, plain


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = benchmark_data.build(tmp_path_factory.mktemp("eval"))
    labeled = [row | {"label": "x"} for row in benchmark_data.questions("What?")]
    write_lines(root / "labeled.jsonl", labeled)
    bench = root / "llava-bench-in-the-wild"
    write_lines(bench / "context.jsonl", [{"image": name, "caption": ["A lake."]} for name in benchmark_data.NAMES])
    write_json(bench / "rule.json", {"llava_bench_detail": {"role": "Assistant", "prompt": "Judge."}})
    return root


def outcome(name: str, data: Path, tmp_path: Path, ids: list[Any], **more: Any) -> Any:
    """What the program makes of answers to these questions."""
    if name == "mmbench":
        pytest.importorskip("openpyxl", reason="the extra `eval` is not installed")
    if name == "captions":
        pytest.importorskip("pycocoevalcap", reason="the extra `eval` is not installed")
    scorer = SCORERS[name]
    (tmp_path / "out").mkdir(exist_ok=True)
    write_lines(tmp_path / "answers.jsonl", [scorer.row(key) for key in ids])
    return scorer.run(data, tmp_path / "answers.jsonl", tmp_path / "out", **more)


def nothing_written(tmp_path: Path) -> bool:
    return not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", SCORERS)
def test_complete_answers_are_scored(name: str, data: Path, tmp_path: Path) -> None:
    outcome(name, data, tmp_path, list(SCORERS[name].questions))


WITH_IDS = [name for name, one in SCORERS.items() if str(one.questions[0]).isdigit() and one.row is not of_qbench]


@pytest.mark.parametrize("name", WITH_IDS)
@pytest.mark.parametrize("kind", [int, str])
def test_a_number_and_its_text_are_one_id(name: str, kind: type, data: Path, tmp_path: Path) -> None:
    assert len(WITH_IDS) > 12
    outcome(name, data, tmp_path, [kind(key) for key in SCORERS[name].questions])


@pytest.mark.parametrize("name", SCORERS)
def test_fewer_answers_than_questions_fail(name: str, data: Path, tmp_path: Path) -> None:
    *answered, missing = SCORERS[name].questions
    named = (
        "thing 2" if name == "textvqa" else missing[1].replace("png", "txt") if name == "mme, converter" else missing
    )
    with pytest.raises(BadSampleError, match=rf"1 questions have no answer: .*{named}"):
        outcome(name, data, tmp_path, answered)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("name", SCORERS)
def test_answers_to_no_question_fail(name: str, data: Path, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    with pytest.raises(BadSampleError, match=r"belong to no question|has no question"):
        outcome(name, data, tmp_path, [*scorer.questions, scorer.stranger])
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("name", SCORERS)
def test_answers_to_other_questions_alone_fail(name: str, data: Path, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    for more in ({}, {"lenient": True}) if scorer.lenient else ({},):
        with pytest.raises(BadSampleError, match=r"belong to no question|has no question"):
            outcome(name, data, tmp_path, [scorer.stranger], **more)
    assert nothing_written(tmp_path)


ROUNDS = ("mmbench", "mme, converter")
"""They may hold several answers to a question."""


@pytest.mark.parametrize("name", [name for name in SCORERS if not name.startswith("LaVIN") and name not in ROUNDS])
def test_two_answers_to_a_question_fail(name: str, data: Path, tmp_path: Path) -> None:
    first, *others = SCORERS[name].questions
    again = str(first) if isinstance(first, int) and SCORERS[name].row is not of_qbench else first
    with pytest.raises(BadSampleError, match=r"answered more than once|belong to no question"):
        outcome(name, data, tmp_path, [first, *others, again])
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("name", [name for name, one in SCORERS.items() if one.lenient])
def test_lenient_scores_what_fits_and_says_so(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome(name, data, tmp_path, list(SCORERS[name].questions[:-1]), lenient=True)
    assert "1 questions have no answer" in capsys.readouterr().err


def test_the_compared_form_of_ids() -> None:
    assert id_of(7) == id_of("7") == id_of(7.0) == "7"
    assert len({id_of(one) for one in (7, "07", "7.0", 7.5, "a")}) == 5
    assert by_id([(7, "a"), ("7", "b")]) == {"7": "b"}
    assert misfits([1, 2], ["1", "2"]) == []
    assert misfits([1, "1"], [1]) == ["1 question ids appear more than once in the question file: 1"]
    with pytest.raises(
        BadSampleError, match="2 questions have no answer: 'a', 'b'; 1 answers belong to no question: 3"
    ):
        check_fit(["a", "b"], [3], Sides("answers", "questions"), lenient=True)


# Annotations


def edited(path: Path, change: Callable[[Any], None]) -> Path:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


UNLABELED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "gqa": ("gqa/data/testdev_balanced_questions.json", lambda rows: rows["1"].pop("answer"), "1 questions .*: '1'"),
    "science": ("scienceqa/problems.json", lambda rows: rows["1"].pop("answer"), "1 questions .*: '1'"),
    "seed": ("seed_bench/SEED-Bench.json", lambda file: file["questions"][1].pop("answer"), "1 questions .*: '1'"),
    "textvqa": ("textvqa/TextVQA_0.5.1_val.json", lambda file: file["data"][1].pop("answers"), "'1: what is thing 1"),
}


@pytest.mark.parametrize("name", UNLABELED)
def test_annotations_without_a_right_answer_are_named(name: str, tmp_path: Path) -> None:
    file, change, message = UNLABELED[name]
    root = benchmark_data.build(tmp_path / "eval")
    edited(root / file, change)
    with pytest.raises(BadSampleError, match=rf"have no 'answers?' to compare an answer with: .*|{message}") as error:
        outcome(name, root, tmp_path, list(SCORERS[name].questions))
    assert "no 'answer" in str(error.value)
    assert "1" in str(error.value).partition("with: ")[2]


def test_a_row_of_qbench_without_a_right_answer_is_named() -> None:
    rows = [of_qbench(number) for number in range(3)]
    del rows[1]["correct_ans"]
    with pytest.raises(BadSampleError, match=r"1 of 3 rows have no 'correct_ans': 'im1\.png: How sharp is 1\?'"):
        eval_qbench.score(rows)
    assert eval_qbench.score([{"response": "A"}]) is None


def test_a_category_of_pope_without_labels_is_named(tmp_path: Path) -> None:
    root = benchmark_data.build(tmp_path / "eval")
    (root / "pope" / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(BadSampleError, match=r"no labels of 1 categories of .*: \['popular'\]"):
        outcome("pope", root, tmp_path, list(SCORERS["pope"].questions))


def test_pope_pairs_by_the_order_of_the_questions(data: Path, tmp_path: Path) -> None:
    """Chunks that were merged in another order score alike."""
    rows = [row | {"text": ("no", "yes")[row["question_id"] % 2]} for row in map(plain, SCORERS["pope"].questions)]
    scores = []
    for name, some in (("one", rows), ("other", [*rows[4:], *rows[:4][::-1]])):
        write_lines(tmp_path / name, some)
        scores.append(
            eval_pope.evaluate(data / "pope" / "coco", data / "pope" / "llava_pope_test.jsonl", tmp_path / name)
        )
    assert scores[0] == scores[1]
    assert scores[0]["popular"].tp == 0


def test_a_split_without_its_problems_is_named(tmp_path: Path) -> None:
    root = benchmark_data.build(tmp_path / "eval")
    base = root / "scienceqa"
    edited(base / "problems.json", lambda problems: problems.pop("2"))
    with pytest.raises(BadSampleError, match=r"no problem for 1 questions of the split: '2'"):
        outcome("science", root, tmp_path, ["0", "1", "2"])
    with pytest.raises(BadSampleError, match=r"no problem for 1 questions of split 'test': '2'"):
        sqa_to_llava.convert_to_llava(base, "test", "QCM-LEA")


# Programs without a question file of their own


def test_a_folder_of_mme_without_some_tasks(data: Path, tmp_path: Path) -> None:
    benchmark = data / "MME" / "MME_Benchmark_release_version"
    outcome("mme, converter", data, tmp_path, list(MME))
    folder = tmp_path / "out"
    assert len(eval_mme.evaluate(folder, benchmark)) == len(eval_mme.evaluate(folder, lenient=True)) == 2
    with pytest.raises(BadSampleError, match=r"no answers to 12 tasks: OCR, artwork, .*--data-dir .*--lenient"):
        eval_mme.evaluate(folder)
    lines = (folder / "count.txt").read_text().splitlines(keepends=True)
    (folder / "count.txt").write_text("".join(lines[:-2]))
    with pytest.raises(BadSampleError, match=r"count\.txt: 4 answers to 6 questions of the task"):
        eval_mme.evaluate(folder, benchmark)
    (folder / "count.txt").unlink()
    with pytest.raises(BadSampleError, match="no answers to 1 tasks: count"):
        eval_mme.main(["--results_dir", str(folder), "--data-dir", str(benchmark)])


def test_reviews_of_other_questions(data: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "reviews.jsonl", [of_review(key) for key in (0, 1, "1")])
    with pytest.raises(BadSampleError, match="1 question ids are answered more than once: 1"):
        summarize_gpt_review.relative_scores(tmp_path / "reviews.jsonl")
    write_lines(tmp_path / "reviews.jsonl", [of_review(key) for key in (0, 1)])
    assert summarize_gpt_review.relative_scores(tmp_path / "reviews.jsonl", ["1"])["all"][0] == 75.0
    with pytest.raises(BadSampleError, match="--ignore names 1 questions that have no review here: '5'"):
        summarize_gpt_review.relative_scores(tmp_path / "reviews.jsonl", [5])


def run_file(folder: Path, name: str, ids: list[Any]) -> Path:
    result = {"benchmark": "pope", "title": "POPE", "split": "test", "model": name, "questions": len(ids)}
    result |= {"complete": True, "metrics": {"F1": 1.0}, "settings": {}, "arguments": {}}
    write_json(folder / f"{name}.result.json", result)
    write_lines(folder / f"{name}.samples.jsonl", [{"question_id": key, "score": 1.0} for key in ids])
    return folder / f"{name}.result.json"


def test_runs_on_other_questions_are_not_compared(tmp_path: Path) -> None:
    one, same, shifted, other = (
        read_run(run_file(tmp_path, name, ids))
        for name, ids in (("one", [1, 2]), ("same", ["1", "2"]), ("shifted", [2, 3]), ("other", [7, 8]))
    )
    assert group_runs([one, same])[0].notes == []
    assert group_runs([one, shifted])[0].notes == [
        "the questions differ: 1 of 2 are common; differences are over those"
    ]
    with pytest.raises(
        FlagError, match=r"other\.result\.json: none of its 2 questions is among the 2 of .*one\.result"
    ):
        group_runs([one, other])

"""Scores of ScienceQA and MME, equal to the original's; what it decides by chance or without looking is an option."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError
from llava.eval.eval_mme import parse_response, score_task, totals
from mma.lavin.data.prompts import instruction_prompt
from mma.lavin.scoring.mme import LabelSource, MmeQuestion, read_benchmark, report, response_part, rows_of
from mma.lavin.scoring.scienceqa import GROUPS, UNPARSABLE, choice_of, extract, score
from tests.golden import load_case

SQA = load_case("lavin", "scienceqa_eval")[0]
MME = load_case("lavin", "mme_eval")[0]
ANSWERS = {item["qid"]: item["generated_text"] for item in SQA["items"]}


# ScienceQA


@pytest.mark.parametrize("item", SQA["items"], ids=lambda item: repr(item["generated_text"])[:40])
def test_the_letter_of_an_answer(item: dict[str, Any]) -> None:
    letter = extract(item["generated_text"])
    assert (letter or "FAILED") == item["extracted"]
    chosen = choice_of(item["generated_text"], item["n_choices"])
    assert chosen == (UNPARSABLE if item["random_fallback"] else item["pred_index"])


def test_scores_with_drawn_choices_are_the_originals() -> None:
    fallback = random.Random(SQA["python_random_seed_before_run"])
    found = score(ANSWERS, SQA["problems"], fallback=fallback)
    assert found.predictions == SQA["preds_json"]
    assert found.scores == SQA["scores"]
    assert found.accuracy("acc_average") == pytest.approx(SQA["overall_accuracy_percent"])
    assert "a choice was drawn at random" in str(found)


def test_unparsable_answers_are_wrong_and_counted() -> None:
    found = score(ANSWERS, SQA["problems"])
    unparsable = [item["qid"] for item in SQA["items"] if item["random_fallback"]]
    assert found.unparsable == unparsable
    right = sum(item["pred_index"] == item["answer"] for item in SQA["items"] if not item["random_fallback"])
    assert found.right["acc_average"] == right < SQA["overall_accuracy_percent"] * SQA["n_scored"] / 100
    assert f"{len(unparsable)} answers name no choice; they count as wrong" in str(found)
    assert {found.predictions[qid] for qid in unparsable} == {UNPARSABLE}


def test_a_problem_may_leave_out_that_it_has_no_image() -> None:
    """As everywhere before the score, an entry without `image` has none."""
    lean = {
        qid: {key: value for key, value in problem.items() if key != "image" or value is not None}
        for qid, problem in SQA["problems"].items()
    }
    assert any("image" not in problem for problem in lean.values())
    assert score(ANSWERS, lean) == score(ANSWERS, SQA["problems"])


def test_a_group_without_problems_has_no_score() -> None:
    name = next(qid for qid, problem in SQA["problems"].items() if problem["image"] is None)
    found = score({name: "The answer is A."}, SQA["problems"])
    assert found.scores["acc_has_image"] is None
    assert "no problems" in str(found)
    assert set(found.scores) == set(GROUPS) == set(SQA["scores"])


# MME


def save_benchmark(root: Path) -> None:
    """The folders of the case."""
    for subset, content in MME["inputs"].items():
        flat = content["layout"] == "flat"
        images = root / subset if flat else root / subset / "images"
        texts = root / subset if flat else root / subset / "questions_answers_YN"
        for folder in (images, texts):
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in content["files"].items():
            (images / name).touch()
            (texts / name).with_suffix(".txt").write_text(text)


def replies(questions: list[MmeQuestion]) -> dict[str, str]:
    given = {item["key"]: item for item in MME["generations"]}
    texts = {}
    for question in questions:
        key = f"{question.subset}/{Path(question.image).stem}/{('pos', 'neg')[question.number]}"
        assert instruction_prompt(question.text) == given[key]["prompt"]
        texts[question.name] = given[key]["reply"]
    return texts


@pytest.mark.parametrize("item", MME["generations"], ids=lambda item: item["key"])
def test_the_word_of_a_reply(item: dict[str, Any]) -> None:
    assert parse_response(response_part(item["reply"])) == item["parsed"]


def test_a_reply_ends_where_another_turn_begins() -> None:
    assert response_part(" Yes\nInstruction: x\nResponse: No") == " yes\ninstruction: x\n"


@pytest.mark.parametrize(
    ("reply", "judged"),
    [
        *((" Yes", "yes"), ("Yes", "yes"), ("\nYes", "yes"), ("\n\nYes", "other"), ("  Yes", "other")),
        *(("  No", "no"), ("   No", "other"), ("\t\tno", "no"), (" A no", "other"), ("A no", "no")),
        *((" I know", "other"), ("I know", "other"), (" Know", "no"), (" ", "other"), ("", "other")),
    ],
)
def test_the_first_four_characters_count_as_they_are(reply: str, judged: str) -> None:
    """The original lowers the case and cuts: white space in front is a character like any other."""
    assert ("yes" if "yes" in reply.lower()[:4] else "no" if "no" in reply.lower()[:4] else "other") == judged
    assert parse_response(response_part(reply)) == judged


def test_scores_by_the_order_of_the_lines_are_the_originals(tmp_path: Path) -> None:
    save_benchmark(tmp_path)
    questions, others = read_benchmark(tmp_path, LabelSource.ORDER)
    assert not others
    scores = {subset: score_task(rows) for subset, rows in rows_of(questions, replies(questions)).items()}
    for subset, expected in MME["per_subset"].items():
        assert scores[subset].accuracy * 100 == pytest.approx(expected["accuracy"])
        assert scores[subset].accuracy_plus * 100 == pytest.approx(expected["accuracy+"])
    groups = totals(scores)
    assert groups["Perception"] == pytest.approx(MME["totals"]["perception_score"])
    assert groups["Cognition"] == pytest.approx(MME["totals"]["cognition_score"])
    ours, theirs = report(scores, groups).splitlines(), MME["mme_eval_txt_example"].splitlines()
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        name, _, value = one.partition(": ")
        their_name, _, their_value = other.partition(": ")
        assert name == their_name
        assert value == their_value or float(value) == pytest.approx(float(their_value))


def test_scores_by_the_labels_of_the_files_differ(tmp_path: Path) -> None:
    save_benchmark(tmp_path)
    questions, _ = read_benchmark(tmp_path, LabelSource.FILE)
    by_order, _ = read_benchmark(tmp_path, LabelSource.ORDER)
    swapped = {question.name for question, other in zip(questions, by_order, strict=True) if question != other}
    assert swapped  # the case has files in which the answers are swapped
    scores = {subset: score_task(rows) for subset, rows in rows_of(questions, replies(questions)).items()}
    changed = {question.subset for question in questions if question.name in swapped}
    for subset, expected in MME["per_subset"].items():
        same = scores[subset].accuracy * 100 == pytest.approx(expected["accuracy"])
        assert same == (subset not in changed)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match="no such folder"):
        read_benchmark(tmp_path / "mme", LabelSource.FILE)
    with pytest.raises(BadSampleError, match="no folder of a subset"):
        read_benchmark(tmp_path, LabelSource.FILE)
    save_benchmark(tmp_path)
    (tmp_path / "eval_tool").mkdir()
    assert read_benchmark(tmp_path, LabelSource.FILE)[1] == ["eval_tool"]
    broken = tmp_path / "OCR" / "000.txt"
    broken.write_text("Is it?\tMaybe\nIs it not?\tNo\n")
    with pytest.raises(BadSampleError, match=r"000\.txt:1: behind the tab stands 'Maybe'"):
        read_benchmark(tmp_path, LabelSource.FILE)
    broken.write_text("Is it?\tYes\n")
    with pytest.raises(BadSampleError, match="1 lines, must be two"):
        read_benchmark(tmp_path, LabelSource.FILE)
    broken.unlink()
    with pytest.raises(BadSampleError, match=r"000\.txt: no such file"):
        read_benchmark(tmp_path, LabelSource.FILE)

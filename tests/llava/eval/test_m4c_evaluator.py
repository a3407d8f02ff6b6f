"""Normalisation and soft accuracy: every stage as recorded from the original."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llava.errors import BadSampleError
from llava.eval.m4c_evaluator import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
    edit_distance,
)
from tests.golden import golden_dir

METRICS = golden_dir("metrics")
ANSWERS = json.loads((METRICS / "case_answer_processor.json").read_text(encoding="utf-8"))["cases"]
SCORES: dict[str, Any] = json.loads((METRICS / "case_vqa_evaluators.json").read_text(encoding="utf-8"))
ITEMS, OUT = SCORES["items"], SCORES["out"]


@pytest.mark.parametrize("case", ANSWERS, ids=range(len(ANSWERS)))
def test_normalisation(case: dict[str, str]) -> None:
    processor = EvalAIAnswerProcessor()
    assert processor.word_tokenize(case["in"]) == case["word_tokenize"]
    assert processor.process_punctuation(case["stripped"]) == case["process_punctuation"]
    assert processor(case["in"]) == case["out"]


def test_soft_accuracy() -> None:
    evaluator = TextVQAAccuracyEvaluator()
    assert [evaluator.answer_scores(item["gt_answers"]) for item in ITEMS] == OUT["answer_scores"]
    assert [evaluator.score(item) for item in ITEMS] == OUT["per_item"]
    assert evaluator.eval_pred_list(ITEMS) == OUT["textvqa_accuracy"]
    with pytest.raises(BadSampleError, match="9 reference answers, must be 10"):
        evaluator.score({"pred_answer": "a", "gt_answers": ["a"] * 9})
    with pytest.raises(BadSampleError, match="no answers"):
        evaluator.eval_pred_list([])


def test_scene_text_scores() -> None:
    exact, similar = STVQAAccuracyEvaluator(), STVQAANLSEvaluator()
    assert [exact.score(item) for item in ITEMS] == OUT["stvqa_accuracy_per_item"]
    assert exact.eval_pred_list(ITEMS) == OUT["stvqa_accuracy"]
    written = [item for item in ITEMS if item["pred_answer"].strip()]
    assert [similar.score(item) for item in written] == OUT["stvqa_anls_per_item"]
    assert similar.eval_pred_list(written) == pytest.approx(OUT["stvqa_anls"], abs=1e-12)
    assert similar.get_anls("", " ") == 1.0  # a division by zero in the original


def test_edit_distance() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("ab", "ba"))] == [3, 3, 2]

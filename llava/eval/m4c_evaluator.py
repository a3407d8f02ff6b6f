"""Answer normalisation and soft accuracy of the VQA benchmarks (upstream `llava/eval/m4c_evaluator.py`).

Equal to upstream's numbers to the last digit, quirks of its normalisation included: published scores and evaluation
servers have them. Used for TextVQA, and for the answers that go to the servers of VQAv2 and VizWiz.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypedDict

from llava.errors import BadSampleError
from llava.eval.scoring.captions import bleu4, pair
from llava.eval.scoring.contractions import CONTRACTIONS

ANNOTATORS = 10
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
COMMA_BETWEEN_DIGITS = re.compile(r"(?<=\d),+(?=\d)")
# Upstream: the look-behind that would keep `5.` is malformed and does nothing, so only the digit behind counts.
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32
"""Upstream passes the flag `re.UNICODE` (32) where `sub` takes the number of replacements."""


class Prediction(TypedDict):
    """An answer and what the annotators said."""

    pred_answer: str
    gt_answers: Sequence[str]


class EvalAIAnswerProcessor:
    """Brings an answer into the form in which the VQA evaluation compares it."""

    def word_tokenize(self, word: str) -> str:
        """Lower case, without commas and question marks, a blank before `'s`."""
        return word.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()

    def process_punctuation(self, text: str) -> str:
        """Delete or replace punctuation, delete periods that no digit follows.

        A sign that touches a blank anywhere in `text` is deleted everywhere; otherwise a blank takes its place.
        """
        delete_all = COMMA_BETWEEN_DIGITS.search(text) is not None
        result = text
        for sign in PUNCTUATION:
            delete = delete_all or f"{sign} " in text or f" {sign}" in text
            result = result.replace(sign, "" if delete else " ")
        return PERIOD.sub("", result, count=PERIODS_REMOVED)

    def process_digit_article(self, text: str) -> str:
        """Number words to digits, articles dropped, contractions with their apostrophe, single blanks."""
        words = (NUMBERS.get(word, word) for word in text.lower().split())
        return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

    def __call__(self, answer: str) -> str:
        """All steps."""
        text = self.word_tokenize(answer).replace("\n", " ").replace("\t", " ").strip()
        return self.process_digit_article(self.process_punctuation(text))


class _Evaluator:
    """Averages a score over predictions."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def score(self, prediction: Prediction) -> float:
        """The score of one answer, in [0, 1]."""
        return float(self._score(prediction["pred_answer"], prediction["gt_answers"]))

    def eval_pred_list(self, pred_list: Sequence[Prediction]) -> float:
        """Mean score.

        Raises:
            BadSampleError: the list is empty, or an item has a wrong number of reference answers.
        """
        if not pred_list:
            raise BadSampleError("there are no answers to score")
        return sum(map(self.score, pred_list)) / len(pred_list)

    _score: Callable[[str, Sequence[str]], float]


class TextVQAAccuracyEvaluator(_Evaluator):
    """Soft accuracy: each annotator in turn is left out, and three of the others must agree for the full score."""

    def answer_scores(self, raw_answers: Sequence[str]) -> dict[str, float]:
        """The score of each distinct normalised answer.

        Args:
            raw_answers: those of the ten annotators.

        Raises:
            BadSampleError: they are not ten.
        """
        if len(raw_answers) != ANNOTATORS:
            raise BadSampleError(f"{len(raw_answers)} reference answers, must be {ANNOTATORS}: {list(raw_answers)}")
        answers = [self.answer_processor(answer) for answer in raw_answers]
        scores = {}
        for candidate in answers:
            votes = answers.count(candidate)
            # One addend for each annotator, in order: the rounding of the sum is part of the published numbers.
            shares = [min(1, float(votes - (answer == candidate)) / 3) for answer in answers]
            scores[candidate] = sum(shares) / len(shares)
        return scores

    def _score(self, answer: str, references: Sequence[str]) -> float:
        return self.answer_scores(references).get(self.answer_processor(answer), 0.0)


class STVQAAccuracyEvaluator(_Evaluator):
    """1 if the normalised answer is one of the normalised references."""

    def _score(self, answer: str, references: Sequence[str]) -> float:
        return float(self.answer_processor(answer) in map(self.answer_processor, references))


class STVQAANLSEvaluator(_Evaluator):
    """Average normalised Levenshtein similarity with the best reference; below one half it counts nothing."""

    def _score(self, answer: str, references: Sequence[str]) -> float:
        return max(self.get_anls(answer, reference) for reference in references)

    def get_anls(self, first: str, second: str) -> float:
        """Similarity of two texts, in {0} or [0.5, 1]; two empty texts are alike."""
        first, second = first.lower().strip(), second.lower().strip()
        longest = max(len(first), len(second))
        similarity = 1 - edit_distance(first, second) / longest if longest else 1.0
        return similarity if similarity >= 0.5 else 0.0


class TextCapsBleu4Evaluator:
    """BLEU-4 of captions; needs the extra `eval`, and Java for its tokenizer."""

    def eval_pred_list(self, pred_list: Sequence[Prediction]) -> float:
        """BLEU-4 over all items, in [0, 1]."""
        references = [list(item["gt_answers"]) for item in pred_list]
        return bleu4(pair([item["pred_answer"] for item in pred_list], references))


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and replacements of single characters that lead from one text to the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]

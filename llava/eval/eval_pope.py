"""POPE: precision, recall and accuracy of yes/no answers about objects (upstream `llava/eval/eval_pope.py`).

python -m llava.eval.eval_pope --annotation-dir pope/coco --question-file pope/llava_pope_test.jsonl \
    --result-file pope/answers/llava-v1.5-7b.jsonl

Prints the same lines as upstream, the categories in alphabetical order. Answers are paired with labels by their order
within a category. Where their numbers differ, the pairs are wrong from the first missing answer on: upstream says
nothing, here there is a warning, and with `--strict` an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import BadSampleError
from llava.eval.answering.questions import field, read_jsonl
from llava.runtime.program import run_program

PREFIX, SUFFIX = "coco_pope_", ".json"
NO = frozenset({"No", "not", "no"})


@dataclass(frozen=True)
class PopeScore:
    """Counts of one category; "yes" is the positive answer."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return (self.tp + self.tn) / self.n

    @property
    def precision(self) -> float:
        """Share of right answers among those that say yes; 0 if none does."""
        return self.tp / (self.tp + self.fp) if self.tp + self.fp else 0.0

    @property
    def recall(self) -> float:
        """Share of objects that were seen; 0 if there are none."""
        return self.tp / (self.tp + self.fn) if self.tp + self.fn else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def says_yes(text: str) -> bool:
    """What an answer is taken for: no, if the first sentence has one of the words of `NO`; else yes."""
    sentence = text.partition(".")[0].replace(",", "")
    return not NO & set(sentence.split(" "))


def score(answers: Iterable[bool], labels: Iterable[bool]) -> PopeScore:
    """Counts over pairs, as far as the shorter of the two goes.

    Raises:
        BadSampleError: there are no pairs.
    """
    pairs = list(zip(answers, labels, strict=False))
    if not pairs:
        raise BadSampleError("a POPE category without answers or without labels cannot be scored")
    return PopeScore(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, False), (False, True))))


def read_labels(path: Path) -> list[bool]:
    """The labels of a category; only `no` is negative."""
    return [field(row, "label", (str,), where) != "no" for where, row in read_jsonl(path)]


def lines(result: PopeScore, answers: Sequence[bool]) -> str:
    """Upstream's printed lines."""
    yes = sum(answers) / len(answers)
    summary = (result.f1, result.accuracy, result.precision, result.recall, yes)
    return "\n".join(
        (
            "TP\tFP\tTN\tFN\t",
            f"{result.tp}\t{result.fp}\t{result.tn}\t{result.fn}",
            f"Accuracy: {result.accuracy}",
            f"Precision: {result.precision}",
            f"Recall: {result.recall}",
            f"F1 score: {result.f1}",
            f"Yes ratio: {yes}",
            ", ".join(f"{value:.3f}" for value in summary),
        )
    )


def evaluate(
    annotation_dir: str | Path, question_file: str | Path, result_file: str | Path, *, strict: bool = False
) -> dict[str, PopeScore]:
    """Score every category that the folder has labels for, and print upstream's lines.

    Returns:
        the score of each category.

    Raises:
        BadSampleError: there are no label files, an answer belongs to no question, no category has answers, or
            (`strict`) one has not as many answers as labels.
    """
    categories = {
        field(row, "question_id", (int, str), where): field(row, "category", (str,), where)
        for where, row in read_jsonl(question_file)
    }
    by_category: dict[str, list[bool]] = {}
    for where, row in read_jsonl(result_file):
        question_id = field(row, "question_id", (int, str), where)
        if question_id not in categories:
            raise BadSampleError(f"{where}: {question_file} has no question {question_id!r}")
        by_category.setdefault(categories[question_id], []).append(says_yes(field(row, "text", (str,), where)))
    paths = sorted(Path(annotation_dir).glob(f"{PREFIX}*{SUFFIX}"))
    if not paths:
        raise BadSampleError(f"{annotation_dir}: no label files {PREFIX}*{SUFFIX} here")
    scores = {}
    for path in paths:
        category = path.name.removeprefix(PREFIX).removesuffix(SUFFIX)
        answers, labels = by_category.get(category, []), read_labels(path)
        if len(answers) != len(labels):
            fault = f"{result_file}: {len(answers)} answers of category '{category}' for {len(labels)} labels in {path}"
            if strict:
                raise BadSampleError(f"{fault}; answer the missing questions first")
            print(f"warning: {fault}; behind the first missing answer the pairs are wrong", file=sys.stderr)
            if not answers:
                continue
        scores[category] = score(answers, labels)
        print(f"Category: {category}, # samples: {len(answers)}")
        print(lines(scores[category], answers))
        print("====================================")
    if not scores:
        raise BadSampleError(f"{result_file}: no answer of any category that {annotation_dir} has labels for")
    return scores


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--strict`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_pope", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotation-dir", type=str, required=True, help="folder with coco_pope_<category>.json")
    parser.add_argument("--question-file", type=str, required=True, help="questions with question_id and category")
    parser.add_argument("--result-file", type=str, required=True, help="answers file")
    parser.add_argument("--strict", action="store_true", help="an answer too few or too many is an error")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, PopeScore]:
    """Run the program; returns the scores by category.

    Raises:
        BadSampleError: see `evaluate`.
    """
    args = build_parser().parse_args(argv)
    return evaluate(args.annotation_dir, args.question_file, args.result_file, strict=args.strict)


if __name__ == "__main__":
    run_program(main)

"""POPE: precision, recall and accuracy of yes/no answers about objects (upstream `llava/eval/eval_pope.py`).

python -m llava.eval.eval_pope --annotation-dir pope/coco --question-file pope/llava_pope_test.jsonl \
    --result-file pope/answers/llava-v1.5-7b.jsonl

Prints the same lines as upstream, the categories in alphabetical order. The labels of a category have no ids: they are
in the order of its questions, by which answers are paired with them. A missing answer would pair all that follow with
the wrong label, as it does upstream; here it is an error, and with `--lenient` a warning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_jsonl
from llava.eval.scoring.matching import Sides, add_lenient, check_fit, id_of, read_pairs
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


def read_by_category(question_file: str | Path, result_file: str | Path, *, lenient: bool) -> dict[str, list[bool]]:
    """What the answers say, by category, in the order of the questions where each has one answer.

    Raises:
        BadSampleError: a file is broken, or answers do not fit the questions.
    """
    rows = [(field(row, "question_id", (int, str), where), where, row) for where, row in read_jsonl(question_file)]
    categories = {id_of(key): field(row, "category", (str,), where) for key, where, row in rows}
    pairs = read_pairs(result_file)
    unknown = [key for key, _ in pairs if id_of(key) not in categories]
    # An answer to no question has no category, so it cannot be left to chance.
    sides = Sides(result_file, question_file)
    check_fit([key for key, _, _ in rows], [key for key, _ in pairs], sides, lenient=lenient and not unknown)
    order = {key: number for number, key in enumerate(categories)}
    if not lenient:
        pairs.sort(key=lambda pair: order[id_of(pair[0])])
    by_category: dict[str, list[bool]] = {}
    for key, text in pairs:
        by_category.setdefault(categories[id_of(key)], []).append(says_yes(text))
    return by_category


def _unequal(result_file: str | Path, category: str, answers: list[bool], labels: list[bool], path: Path) -> str:
    return f"{result_file}: {len(answers)} answers of category '{category}' for {len(labels)} labels in {path}"


def _refuse_unequal(
    result_file: str | Path, paths: dict[str, Path], answers: dict[str, list[bool]], labels: dict[str, list[bool]]
) -> None:
    """Raise if a category has not as many answers as labels."""
    for category, path in paths.items():
        found = answers.get(category, [])
        if len(found) != len(labels[category]):
            fault = _unequal(result_file, category, found, labels[category], path)
            raise BadSampleError(f"{fault}; the questions must be those of the labels, and all be answered")


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
    annotation_dir: str | Path, question_file: str | Path, result_file: str | Path, *, lenient: bool = False
) -> dict[str, PopeScore]:
    """Score every category that the folder has labels for, and print upstream's lines.

    Returns:
        the score of each category.

    Raises:
        BadSampleError: there are no label files, an answer belongs to no question, no category has answers, or
            (without `lenient`) a question has no answer, or a category not as many answers as labels.
    """
    by_category = read_by_category(question_file, result_file, lenient=lenient)
    paths = {
        path.name.removeprefix(PREFIX).removesuffix(SUFFIX): path
        for path in sorted(Path(annotation_dir).glob(f"{PREFIX}*{SUFFIX}"))
    }
    if not paths:
        raise BadSampleError(f"{annotation_dir}: no label files {PREFIX}*{SUFFIX} here")
    unlabeled = sorted(by_category.keys() - paths.keys())
    if unlabeled and not lenient:
        raise BadSampleError(
            f"{annotation_dir}: no labels of {len(unlabeled)} categories of {question_file}: {unlabeled}"
        )
    labels = {category: read_labels(path) for category, path in paths.items()}
    if not lenient:  # all categories are compared before the first one is printed
        _refuse_unequal(result_file, paths, by_category, labels)
    scores = {}
    for category in paths:
        answers = by_category.get(category, [])
        if len(answers) != len(labels[category]):
            fault = _unequal(result_file, category, answers, labels[category], paths[category])
            print(f"warning: {fault}; after the first missing answer the pairs are wrong", file=sys.stderr)
            if not answers:
                continue
        scores[category] = score(answers, labels[category])
        print(f"Category: {category}, # samples: {len(answers)}")
        print(lines(scores[category], answers))
        print("====================================")
    if not scores:
        raise BadSampleError(f"{result_file}: no answer of any category that {annotation_dir} has labels for")
    return scores


def build_parser() -> argparse.ArgumentParser:
    """The original options and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_pope", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotation-dir", type=str, required=True, help="folder with coco_pope_<category>.json")
    parser.add_argument("--question-file", type=str, required=True, help="questions with question_id and category")
    parser.add_argument("--result-file", type=str, required=True, help="answers file")
    add_lenient(parser)
    parser.add_argument("--strict", action="store_true", help="the default, accepted for earlier command lines")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, PopeScore]:
    """Run the program; returns the scores by category.

    Raises:
        BadSampleError: see `evaluate`.
        FlagError: two flags contradict each other.
    """
    args = build_parser().parse_args(argv)
    if args.strict and args.lenient:
        raise FlagError("--strict and --lenient exclude each other; pass one of them")
    return evaluate(args.annotation_dir, args.question_file, args.result_file, lenient=args.lenient)


if __name__ == "__main__":
    run_program(main)

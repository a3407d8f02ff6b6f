"""ScienceQA by two models: answers of ours next to answers of GPT-4, question by question.

Shared by `eval_science_qa_gpt4.py` and `eval_science_qa_gpt4_requery.py`. An answer counts by its only "The answer is
X."; what has none is guessed, as upstream does, but from a seed and the question's id, so that equal runs give equal
numbers.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import field, read_json, read_jsonl
from llava.eval.eval_science_qa import FAILED, STATED
from llava.eval.scoring.matching import Sides, by_id, check_fit

Answers = dict[str, str]


def stated_letter(text: str) -> str:
    """The letter of the only "The answer is X." in a text, else `FAILED`."""
    found = STATED.findall(text)
    return found[0] if len(found) == 1 else FAILED


@dataclass(frozen=True)
class Prediction:
    """What an answer says.

    Attributes:
        letter: see `stated_letter`.
        index: which choice that is; a guess where the letter names none.
        text: the whole answer.
    """

    letter: str
    index: int
    text: str

    @property
    def failed(self) -> bool:
        """True if the answer states no letter."""
        return self.letter == FAILED


@dataclass(frozen=True)
class Problem:
    """A question of the split with what each model said.

    Attributes:
        key: id of the question.
        answer: index of the right choice.
        said: by name of the model.
    """

    key: str
    answer: int
    said: dict[str, Prediction]

    def right(self, name: str) -> bool:
        """Whether a model named the right choice."""
        return self.said[name].index == self.answer


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both programs have, and `--seed`."""
    parser.add_argument("--base-dir", type=str, required=True, help="folder with problems.json and pid_splits.json")
    parser.add_argument(
        "--gpt4-result", type=str, required=True, help="GPT-4: JSON with `outputs`, the answers by question id"
    )
    parser.add_argument("--our-result", type=str, required=True, help="answers file of the model")
    parser.add_argument("--split", type=str, default="test", help="split of pid_splits.json")
    parser.add_argument("--options", type=list, default=list("ABCDE"), help="letters of the choices, as ABCDE")
    parser.add_argument("--seed", type=int, default=0, help="of the guesses in place of answers without a letter")


def read_problems(base_dir: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """The problems of a split by id, in its order.

    Raises:
        BadSampleError: a file is missing or broken, or the split is unknown or empty.
    """
    base = Path(base_dir)
    splits = read_json(base / "pid_splits.json", dict)
    if not splits.get(split):
        raise BadSampleError(f"{base / 'pid_splits.json'}: no questions in split '{split}'; it has {sorted(splits)}")
    problems = read_json(base / "problems.json", dict)
    missing = [key for key in splits[split] if key not in problems]
    if missing:
        raise BadSampleError(
            f"{base / 'problems.json'}: lacks {len(missing)} questions of the split, first {missing[0]!r}"
        )
    return {key: problems[key] for key in splits[split]}


def read_answers(
    path: str | Path, asked: Collection[str], *, lenient: bool | None = None, all_asked: bool = True
) -> dict[str, dict[str, Any]]:
    """The rows of an answers file by question id.

    Args:
        path: the file.
        asked: ids of the questions of the split.
        lenient: see `check_fit`.
        all_asked: every question must have an answer.

    Raises:
        BadSampleError: the file is missing or broken, a row has no id or no text, or answers do not fit the questions.
    """
    rows = [(field(row, "question_id", (str, int), where), where, row) for where, row in read_jsonl(path)]
    for _, where, row in rows:
        field(row, "text", (str,), where)
    by_key = by_id((key, row) for key, _, row in rows)
    wanted = [key for key in asked if all_asked or key in by_key]
    check_fit(wanted, [key for key, _, _ in rows], Sides(path, "the split"), lenient=lenient)
    return by_key


def check_reference(path: str | Path, answers: Answers, asked: Collection[str], *, lenient: bool | None = None) -> None:
    """Refuse answers of GPT-4 that are not those to all questions; there may be some to other splits.

    Raises:
        BadSampleError: a question has no answer.
    """
    check_fit(list(asked), list(answers), Sides(path, "the split"), lenient=lenient, known=answers.keys())


def read_gpt4(path: str | Path) -> Answers:
    """The `outputs` of a result of GPT-4, upstream's `llava/eval/table/results/test_sqa_*.json` or the authors'.

    Raises:
        BadSampleError: the file is missing or broken.
    """
    outputs = field(read_json(path, dict), "outputs", (dict,), str(path))
    return {key: field(outputs, key, (str,), f"{path}: outputs") for key in outputs}


def predict(key: str, name: str, text: str, choices: Sequence[str], args: argparse.Namespace) -> Prediction:
    """What a model's answer to a question says.

    Args:
        key: id of the question.
        name: of the model; guesses of two models are independent.
        text: its answer.
        choices: of the question.
        args: `options` and `seed`.
    """
    letter, letters = stated_letter(text), args.options[: len(choices)]
    guess = random.Random(f"{args.seed}:{name}:{key}").randrange(len(choices))
    return Prediction(letter, letters.index(letter) if letter in letters else guess, text)


def line(total: int, name: str, count: int, share: str = "Accuracy") -> str:
    """A line of upstream's programs."""
    return f"Total: {total}, {name}: {count}, {share}: {count / total * 100:.2f}%"

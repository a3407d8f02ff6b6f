"""Two answers to each question, compared by a language model: what is asked, and the file of reviews.

Shared by `eval_gpt_review.py`, `eval_gpt_review_visual.py` and `eval_gpt_review_bench.py`, which differ in what the
reviewer is told about the image and in which rule belongs to a category. The service is OpenAI's, or any with the same
interface at OPENAI_BASE_URL. A request that fails ends the program; the same command again asks for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_json, read_jsonl
from llava.eval.answering.recognition import REVIEW_SHAPE, check_writable, recognize_rows, repair
from llava.eval.scoring.matching import Sides, by_id, check_fit, id_of, listed
from llava.runtime.places import Input, refuse_file

BASE_URL = "https://api.openai.com/v1"
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
SECONDS = 300

Row = dict[str, Any]
ContextOf = Callable[[Row, str], str]
"""From a question and its `file:line` to what the reviewer is told about the image."""


def parse_scores(review: str) -> list[float]:
    """The two scores in the first line of a review.

    Raises:
        BadSampleError: they are not there (upstream writes -1 and -1 and averages them).
    """
    words = review.partition("\n")[0].replace(",", " ").split()
    try:
        first, second = map(float, words)
    except ValueError as error:
        raise BadSampleError(f"no pair of scores in the first line of the review: {review[:200]!r}") from error
    return [first, second]


def content(question: Row, context: str | None, answers: Sequence[str], rule: dict[str, str]) -> str:
    """What the reviewer is asked.

    Args:
        question: its `text`.
        context: what is known about the image; None: the question has none.
        answers: the two answers.
        rule: `role` of those who answer, and `prompt`.
    """
    role = rule["role"]
    parts = [] if context is None else [f"[Context]\n{context}\n\n"]
    parts.append(f"[Question]\n{question['text']}\n\n")
    parts += [
        f"[{role} {number}]\n{text}\n\n[End of {role} {number}]\n\n" for number, text in enumerate(answers, start=1)
    ]
    return "".join(parts) + f"[System]\n{rule['prompt']}\n\n"


def ask(text: str, *, model: str, max_tokens: int) -> str:
    """The review of the service.

    Raises:
        FlagError: there is no key, or the service cannot be reached or refuses.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise FlagError("OPENAI_API_KEY is not set: the reviews come from a paid service")
    url = f"{os.environ.get('OPENAI_BASE_URL', BASE_URL).rstrip('/')}/chat/completions"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "temperature": TEMPERATURE, "max_tokens": max_tokens}
    request = urllib.request.Request(  # noqa: S310  # the user's own address
        url, json.dumps(body).encode(), {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
            return str(json.load(response)["choices"][0]["message"]["content"])
    except (urllib.error.URLError, OSError, ValueError, LookupError) as error:
        raise FlagError(f"{url}: {error}; rerun the same command to resume") from error


def add_options(parser: argparse.ArgumentParser, model: str, context: str | None = None) -> None:
    """The original options, `--model` and `--subset`.

    Args:
        parser: of the program.
        model: the original's reviewer.
        context: what the file of `--context` contains; None: the program has no such option.
    """
    parser.add_argument("-q", "--question", required=True, help="the questions, JSON lines")
    if context is not None:
        parser.add_argument("-c", "--context", required=True, help=context)
    parser.add_argument("-a", "--answer-list", nargs="+", default=[], help="answers of the reference and of the model")
    parser.add_argument("-r", "--rule", required=True, help="JSON: prompt and role by category")
    parser.add_argument("-o", "--output", required=True, help="reviews, JSON lines; continued")
    parser.add_argument("--max-tokens", type=int, default=1024, help="limit on the tokens of a review")
    parser.add_argument("--model", type=str, default=model, help="the reviewer; scores of different ones differ")
    parser.add_argument("--subset", action="store_true", help="--question is a part of what both files answer")


def read_requests(
    args: argparse.Namespace,
    context_of: ContextOf | None = None,
    *,
    prefix: str = "",
    default: str | None = None,
) -> list[tuple[Row, str]]:
    """What is known of each review, and what is asked for it.

    Args:
        args: the options of `add_options`.
        context_of: what the reviewer is told about the image of a question; None: nothing.
        prefix: put before a question's category to have the name of its rule, which is the category of the review.
        default: the rule of categories that have none; None: they are an error.

    Raises:
        FlagError: there are not two answers files.
        BadSampleError: a file is broken, the files do not fit together, or a category has no rule.
    """
    if len(args.answer_list) != 2:
        raise FlagError(f"--answer-list: {len(args.answer_list)} files, must be two: the reference's and the model's")
    rules = read_json(args.rule, dict)
    questions = read_jsonl(args.question)
    # All is compared before the first paid request.
    answers = [_rows_by_id(path, questions, args) for path in args.answer_list]
    requests = []
    for number, (where, question) in enumerate(questions, start=1):
        key, category = question["question_id"], f"{prefix}{question['category']}"
        rule = category if category in rules else default
        if rule not in rules:
            raise BadSampleError(f"{where}: {args.rule} has no rule '{category}'")
        first, second = (rows[id_of(key)] for rows in answers)
        ids = {f"answer{n}_id": row.get("answer_id", key) for n, row in enumerate((first, second), start=1)}
        known = {"id": number, "question_id": key, **ids, "category": category}
        context = None if context_of is None else context_of(question, where)
        requests.append((known, content(question, context, [first["text"], second["text"]], rules[rule])))
    return requests


def _rows_by_id(path: str, questions: Sequence[tuple[str, Row]], args: argparse.Namespace) -> dict[str, Row]:
    """The rows of an answers file by question.

    Raises:
        BadSampleError: the file is broken, or does not fit the questions.
    """
    rows = [(field(row, "question_id", (int, str), where), where, row) for where, row in read_jsonl(path)]
    for _, where, row in rows:
        field(row, "text", (str,), where)
    asked = [field(row, "question_id", (int, str), where) for where, row in questions]
    known = [id_of(key) for key, _, _ in rows] if args.subset else ()
    check_fit(asked, [key for key, _, _ in rows], Sides(path, args.question), known=known)
    return by_id((key, row) for key, _, row in rows)


def by_image(path: str | Path, describe: Callable[[Row], str]) -> ContextOf:
    """What `--context` says about the image of a question.

    Args:
        path: JSON lines, one for each `image`.
        describe: from such a line to the text.

    Raises:
        BadSampleError: the file is broken, or (when the result is called) has no line for an image.
    """
    rows = {field(row, "image", (str,), where): (where, row) for where, row in read_jsonl(path)}

    def context_of(question: Row, where: str) -> str:
        image = field(question, "image", (str,), where)
        if image not in rows:
            raise BadSampleError(f"{where}: {path} has no line for the image {image!r}")
        place, row = rows[image]
        try:
            return describe(row)
        except (KeyError, TypeError) as error:
            raise BadSampleError(f"{place}: not as expected ({error!r}); its keys are {sorted(row)}") from error

    return context_of


def refuse_inputs(args: argparse.Namespace) -> None:
    """Raise if the reviews would fall on something that the program reads.

    Raises:
        FlagError: see `llava.runtime.places.refuse_file`.
    """
    names = ("question", "context", "rule")
    inputs = [Input(f"--{name}", getattr(args, name, None)) for name in names]
    refuse_file("--output", args.output, [*inputs, *(Input("--answer-list", path) for path in args.answer_list)])


def write_reviews(args: argparse.Namespace, requests: Sequence[tuple[Row, str]]) -> Path:
    """Ask for every review that the file does not have, a row each; returns the file.

    Args:
        args: the options of `add_options`.
        requests: of `read_requests`.

    Raises:
        FlagError, BadSampleError: see `ask` and `parse_scores`; or the file contains something else than reviews of
            these questions.
    """
    output = Path(args.output)
    check_writable(output, "--output")
    found = recognize_rows(output, [REVIEW_SHAPE], what="reviews")
    repair(output, found)
    done = {id_of(row["question_id"]) for _, row in found.rows}
    strange = sorted(done - {id_of(known["question_id"]) for known, _ in requests})
    if strange:
        raise BadSampleError(
            f"{output}: {len(strange)} reviews belong to no question of {args.question}: {listed(strange)}; "
            "name another --output"
        )
    for known, text in tqdm([one for one in requests if id_of(one[0]["question_id"]) not in done], unit="review"):
        review = ask(text, model=args.model, max_tokens=args.max_tokens)
        line = json.dumps(known | {"content": review, "tuple": parse_scores(review)}) + "\n"
        with output.open("a", encoding="utf-8") as file:
            file.write(line)
    print(f"{output}: {len(requests)} reviews; python -m llava.eval.summarize_gpt_review -f {output}")
    return output

r"""Let a language model compare answers on LLaVA-Bench (upstream `llava/eval/eval_gpt_review_bench.py`).

OPENAI_API_KEY=... python -m llava.eval.eval_gpt_review_bench --question questions.jsonl --context context.jsonl \
    --rule rule.json --answer-list answers_gpt4.jsonl answers/llava-v1.5-7b.jsonl --output reviews/llava-v1.5-7b.jsonl

The service is OpenAI's, or any with the same interface at OPENAI_BASE_URL. `rule.json` is upstream's
`llava/eval/table/rule.json`. A request that fails ends the program; the same command again asks for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_json, read_jsonl
from llava.eval.answering.recognition import REVIEW_SHAPE, check_writable, recognize_rows, repair
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

BASE_URL = "https://api.openai.com/v1"
MODEL = "gpt-4-0314"
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE = 0.2
SECONDS = 300


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


def content(question: dict[str, Any], captions: Sequence[str], answers: Sequence[str], rule: dict[str, str]) -> str:
    """What the reviewer is asked."""
    role = rule["role"]
    parts = [f"[Context]\n{chr(10).join(captions)}\n\n", f"[Question]\n{question['text']}\n\n"]
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


def read_requests(args: argparse.Namespace) -> list[tuple[dict[str, Any], str]]:
    """What is known of each review, and what is asked for it.

    Raises:
        BadSampleError: a file is broken, the files do not fit together, or a category has no rule.
    """
    if len(args.answer_list) != 2:
        raise FlagError(f"--answer-list: {len(args.answer_list)} files, must be two: the reference's and the model's")
    rules = read_json(args.rule, dict)
    captions = {field(row, "image", (str,), where): row["caption"] for where, row in read_jsonl(args.context)}
    questions = read_jsonl(args.question)
    answers = [{row["question_id"]: row for _, row in read_jsonl(path)} for path in args.answer_list]
    requests = []
    for number, (where, question) in enumerate(questions, start=1):
        key, category = question["question_id"], f"llava_bench_{question['category']}"
        for path, rows in zip(args.answer_list, answers, strict=True):
            if key not in rows:
                raise BadSampleError(f"{where}: {path} has no answer to question {key!r}")
        if category not in rules:
            raise BadSampleError(f"{where}: {args.rule} has no rule '{category}'")
        first, second = (rows[key] for rows in answers)
        ids = {f"answer{n}_id": row.get("answer_id", key) for n, row in enumerate((first, second), start=1)}
        known = {"id": number, "question_id": key, **ids, "category": category}
        text = content(question, captions[question["image"]], [first["text"], second["text"]], rules[category])
        requests.append((known, text))
    return requests


def build_parser() -> argparse.ArgumentParser:
    """The original options and `--model`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.eval_gpt_review_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-q", "--question", required=True, help="questions.jsonl of the benchmark")
    parser.add_argument("-c", "--context", required=True, help="context.jsonl of the benchmark: captions of the images")
    parser.add_argument("-a", "--answer-list", nargs="+", default=[], help="answers of the reference and of the model")
    parser.add_argument("-r", "--rule", required=True, help="JSON: prompt and role by category")
    parser.add_argument("-o", "--output", required=True, help="reviews, JSON lines; continued")
    parser.add_argument("--max-tokens", type=int, default=1024, help="limit on the tokens of a review")
    parser.add_argument("--model", type=str, default=MODEL, help="the reviewer; scores of different ones differ")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the file of reviews.

    Raises:
        FlagError, BadSampleError: see `read_requests`, `ask` and `parse_scores`.
    """
    args = build_parser().parse_args(argv)
    inputs = [Input("--question", args.question), Input("--context", args.context), Input("--rule", args.rule)]
    refuse_file("--output", args.output, [*inputs, *(Input("--answer-list", path) for path in args.answer_list)])
    requests, output = read_requests(args), Path(args.output)
    check_writable(output, "--output")
    found = recognize_rows(output, [REVIEW_SHAPE], what="reviews")
    repair(output, found)
    done = {row["question_id"] for _, row in found.rows}
    for known, text in tqdm([one for one in requests if one[0]["question_id"] not in done], unit="review"):
        review = ask(text, model=args.model, max_tokens=args.max_tokens)
        line = json.dumps(known | {"content": review, "tuple": parse_scores(review)}) + "\n"
        with output.open("a", encoding="utf-8") as file:
            file.write(line)
    print(f"{output}: {len(requests)} reviews; python -m llava.eval.summarize_gpt_review -f {output}")
    return output


if __name__ == "__main__":
    run_program(main)

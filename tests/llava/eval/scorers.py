"""The scorers and converters in one table: what each asks, and how it is run on a file of answers.

The questions are those of `benchmark_data.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval import (
    eval_captions,
    eval_chartqa,
    eval_gpt_review_bench,
    eval_gqa,
    eval_pope,
    eval_qbench,
    eval_science_qa,
    eval_seed,
    eval_textvqa,
    score,
    summarize_gpt_review,
)
from llava.eval.scoring import mmbench, reviews, submission
from mma.lavin.scoring import mme as lavin_mme
from mma.lavin.scoring import scienceqa as lavin_scienceqa
from tests.llava.eval import benchmark_data


@dataclass(frozen=True)
class Scorer:
    """A program on the tiny benchmarks.

    Attributes:
        questions: ids (or what stands for them) of what is asked.
        row: an answer to one of them.
        run: scores or converts a file of rows; its last argument is a folder to write into.
        stranger: the id of a question that nobody asks.
        lenient: whether the program has `--lenient`: its function takes `lenient`.
    """

    questions: tuple[Any, ...]
    row: Callable[[Any], dict[str, Any]]
    run: Callable[..., Any]
    stranger: Any = 99
    lenient: bool = False


def plain(key: Any) -> dict[str, Any]:
    return {"question_id": key, "text": "x", "prompt": "?"}


def of_image(key: Any) -> dict[str, Any]:
    return {"question_id": key, "text": "x", "prompt": f"What is thing {key}?\n{benchmark_data.SHORT}"}


def of_mme(key: Any) -> dict[str, Any]:
    task, name, number = key
    return {"question_id": f"{task}/{name}", "text": "Yes", "prompt": f"Is it {number}?\n{benchmark_data.SHORT}"}


def of_gqa(key: Any) -> dict[str, Any]:
    return {"questionId": key, "prediction": "x"}


def of_qbench(key: Any) -> dict[str, Any]:
    question = {"img_path": f"im{key}.png", "question": f"How sharp is {key}?"}
    return question | {"candidates": ["very", "not"], "correct_ans": "not", "response": "B"}


def of_review(key: Any) -> dict[str, Any]:
    return {"question_id": key, "tuple": [8, 6], "category": "llava_bench_detail"}


def predictions(data: Path, answers: Path) -> Path:
    """GQA's file is one JSON list."""
    path = answers.with_name("predictions.json")
    path.write_text(json.dumps([json.loads(line) for line in answers.read_text().splitlines()]))
    return path


def review(data: Path, answers: Path, out: Path) -> None:
    """All but the requests."""
    bench = data / "llava-bench-in-the-wild"
    files = [
        "--question",
        bench / "questions.jsonl",
        "--context",
        bench / "context.jsonl",
        "--rule",
        bench / "rule.json",
    ]
    words = [*files, "--answer-list", answers, answers, "--output", out / "reviews.jsonl"]
    args = eval_gpt_review_bench.build_parser().parse_args(list(map(str, words)))
    reviews.read_requests(args, prefix="llava_bench_")


def texts(answers: Path) -> dict[str, str]:
    return {str(row["question_id"]): row["text"] for row in map(json.loads, answers.read_text().splitlines())}


def lavin_questions(data: Path) -> list[lavin_mme.MmeQuestion]:
    return [lavin_mme.MmeQuestion("count", "a.png", number, "?", "yes", "here") for number in range(2)]


REVIEWED = {"question": "questions.jsonl", "context": "context.jsonl", "rule": "rule.json"}
SCIENCE_PROBLEM = {"choices": ["a", "b"], "answer": 0, "subject": "", "hint": "", "image": None, "grade": "grade1"}
LAVIN_MME = ("a.png#0", "a.png#1")
MME = tuple((task, name, n) for task in ("count", "code_reasoning") for name in benchmark_data.NAMES for n in range(2))
CHARTS = tuple(f"{kind}_{n}" for kind in ("human", "augmented") for n in range(3))
VQAV2, MMBENCH = "llava_vqav2_mscoco_test2015.jsonl", "mmbench_dev_20230712.tsv"
SCORERS = {
    "score": Scorer((0, 1, 2), plain, lambda data, answers, out: score.report(data / "labeled.jsonl", answers)),
    "captions": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out: eval_captions.main(
            [
                *("--annotation-file", str(data / "coco_caption" / "annotations" / "captions_val2014.json")),
                *("--result-file", str(answers), "--tokenizer", "plain"),
            ]
        ),
    ),
    "chartqa": Scorer(
        CHARTS,
        plain,
        lambda data, answers, out: eval_chartqa.main(
            ["--annotation-dir", str(data / "chartqa" / "test"), "--result-file", str(answers)]
        ),
        stranger="human_9",
    ),
    "gqa": Scorer(
        ("0", "1", "2"),
        of_gqa,
        lambda data, answers, out: eval_gqa.evaluate(
            data / "gqa" / "data" / "testdev_balanced_questions.json", predictions(data, answers)
        ),
    ),
    "gqa, converter": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out: submission.gqa(
            answers, out / "gqa.json", data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
        ),
    ),
    "mme, converter": Scorer(
        MME,
        of_mme,
        lambda data, answers, out, lenient=False: submission.mme(
            data / "MME" / "MME_Benchmark_release_version", answers, out, lenient=lenient
        ),
        stranger=("count", "im0.png", 7),
        lenient=True,
    ),
    "mmbench": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out, lenient=False: mmbench.write_spreadsheet(
            data / "mmbench" / MMBENCH, answers, out / "sheet.xlsx", lenient=lenient
        ),
        lenient=True,
    ),
    "mmvet, converter": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out: submission.mmvet(
            answers, out / "mmvet.json", data / "mm-vet" / "llava-mm-vet.jsonl"
        ),
    ),
    "pope": Scorer(
        (0, 1, 2, 10, 11, 12),
        plain,
        lambda data, answers, out, lenient=False: eval_pope.evaluate(
            data / "pope" / "coco", data / "pope" / "llava_pope_test.jsonl", answers, lenient=lenient
        ),
        lenient=True,
    ),
    "qbench": Scorer(
        (0, 1, 2),
        of_qbench,
        lambda data, answers, out: eval_qbench.main(
            ["--question-file", str(data / "qbench" / "llvisionqa_dev.json"), "--result-file", str(answers)]
        ),
    ),
    "reviews": Scorer((0, 1, 2), plain, review),
    "summary of reviews": Scorer(
        (0, 1, 2),
        of_review,
        lambda data, answers, out: summarize_gpt_review.relative_scores(
            answers, (), data / "llava-bench-in-the-wild" / "questions.jsonl"
        ),
    ),
    "science": Scorer(
        ("0", "1", "2"),
        plain,
        lambda data, answers, out, lenient=False: eval_science_qa.evaluate(
            data / "scienceqa", answers, lenient=lenient
        ),
        lenient=True,
    ),
    "seed": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out: eval_seed.evaluate(
            data / "seed_bench" / "SEED-Bench.json", answers, out / "upload.jsonl"
        ),
    ),
    "textvqa": Scorer(
        (0, 1, 2),
        of_image,
        lambda data, answers, out, lenient=False: eval_textvqa.eval_single(
            data / "textvqa" / "TextVQA_0.5.1_val.json", answers, lenient=lenient
        ),
        lenient=True,
    ),
    "vizwiz": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out: submission.vizwiz(data / "vizwiz" / "llava_test.jsonl", answers, out / "v.json"),
    ),
    "vqav2": Scorer(
        (0, 1, 2, 10, 11, 12),
        plain,
        lambda data, answers, out, lenient=False: submission.vqav2(
            data / "vqav2" / VQAV2, answers, out / "v.json", lenient=lenient
        ),
        lenient=True,
    ),
    "vqav2, a split": Scorer(
        (0, 1, 2),
        plain,
        lambda data, answers, out, lenient=False: submission.vqav2(
            data / "vqav2" / VQAV2, answers, out / "v.json", asked=["0", "1", "2"], lenient=lenient
        ),
        stranger=10,
        lenient=True,
    ),
    "LaVIN, ScienceQA": Scorer(
        ("0", "1", "2"),
        plain,
        lambda data, answers, out: lavin_scienceqa.score(
            texts(answers), dict.fromkeys("0123", SCIENCE_PROBLEM), asked=["0", "1", "2"]
        ),
    ),
    "LaVIN, MME": Scorer(
        LAVIN_MME,
        plain,
        lambda data, answers, out: lavin_mme.rows_of(lavin_questions(data), texts(answers)),
        stranger="b.png#0",
    ),
}

"""From an answers file to the file that a benchmark's server or own program reads (upstream `scripts/convert_*.py`).

The written files are equal to upstream's byte for byte. `scripts/convert_<benchmark>_for_*.py` are the programs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import field, read_jsonl
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.runtime.files import data_text
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file, refuse_folder

VQAV2_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"
"""All questions of the test split; the server wants an entry for each, also where only test-dev was answered."""

INSTRUCTION = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."


def read_answers_leniently(path: str | Path) -> tuple[dict[int | str, str], int]:
    """Answer text by question_id, the last one of each, and the number of lines that are no JSON.

    A broken line is left out with a warning, as upstream does with the remains of a killed run.

    Raises:
        BadSampleError: the file is missing, or a row lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file")
    texts: dict[int | str, str] = {}
    broken = 0
    for number, line in enumerate(data_text(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            print(f"warning: {where}: not valid JSON, left out ({error})", file=sys.stderr)
            broken += 1
            continue
        texts[field(row, "question_id", (int, str), where)] = field(row, "text", (str,), where)
    return texts, broken


def _normalised(
    questions: str | Path, answers: str | Path, entry: Callable[[str, dict[str, Any], str | None], dict[str, Any]]
) -> list[dict[str, Any]]:
    """One entry for each question, in their order, with the normalised answer or None; prints upstream's counts."""
    rows = read_jsonl(questions)
    texts, broken = read_answers_leniently(answers)
    print(f"total results: {len(texts)}, total split: {len(rows)}, error_line: {broken}")
    processor = EvalAIAnswerProcessor()
    entries = []
    for where, row in rows:
        text = texts.get(field(row, "question_id", (int, str), where))
        entries.append(entry(where, row, None if text is None else processor(text)))
    return entries


def vqav2(questions: str | Path, answers: str | Path, output: str | Path) -> Path:
    """VQAv2: a list of question_id and normalised answer, empty where there is none.

    Returns:
        the written file.

    Raises:
        BadSampleError: a file is missing or broken.
    """
    refuse_file("the output", output, [Input("the questions", questions), Input("the answers", answers)])

    def entry(where: str, row: dict[str, Any], answer: str | None) -> dict[str, Any]:
        return {"question_id": row["question_id"], "answer": answer or ""}

    return replace_text(output, json.dumps(_normalised(questions, answers, entry)))


def vizwiz(questions: str | Path, answers: str | Path, output: str | Path) -> Path:
    """VizWiz: a list of image and normalised answer.

    Returns:
        the written file.

    Raises:
        BadSampleError: a file is missing or broken, or a question has no answer.
    """
    refuse_file("the output", output, [Input("the questions", questions), Input("the answers", answers)])

    def entry(where: str, row: dict[str, Any], answer: str | None) -> dict[str, Any]:
        if answer is None:
            raise BadSampleError(f"{where}: {answers} has no answer to question {row['question_id']!r}")
        return {"image": field(row, "image", (str,), where), "answer": answer}

    return replace_text(output, json.dumps(_normalised(questions, answers, entry)))


def gqa(answers: str | Path, output: str | Path) -> Path:
    """GQA: a list of questionId and prediction, in lower case and without periods at the end.

    Raises:
        BadSampleError: the file is missing or broken.
    """
    refuse_file("the output", output, [Input("the answers", answers)])
    predictions = [
        {
            "questionId": field(row, "question_id", (str, int), where),
            "prediction": field(row, "text", (str,), where).rstrip(".").lower(),
        }
        for where, row in read_jsonl(answers)
    ]
    return replace_text(output, json.dumps(predictions))


def mmvet(answers: str | Path, output: str | Path) -> Path:
    """MM-Vet: an object of `v1_<id>` and answer.

    Raises:
        BadSampleError: the file is missing or broken.
    """
    refuse_file("the output", output, [Input("the answers", answers)])
    texts = {
        f"v1_{field(row, 'question_id', (str, int), where)}": field(row, "text", (str,), where)
        for where, row in read_jsonl(answers)
    }
    return replace_text(output, json.dumps(texts, indent=2))


def mme(data_dir: str | Path, answers: str | Path, output_dir: str | Path) -> Path:
    """MME: a folder with one file per task, lines of image file, question, ground truth and response.

    Args:
        data_dir: `MME_Benchmark_release_version`: a folder per task with `<image>.txt`, beside the images or in
            `questions_answers_YN/`; lines of question and ground truth with a tab between them.
        answers: the question_id of a row is `<task>/<image file>`.
        output_dir: what `llava.eval.eval_mme` and the benchmark's own tool read.

    Raises:
        BadSampleError: a file is broken, or an answer's question is not among the ground truths.
    """
    refuse_folder(
        "the output folder", output_dir, [Input("the ground truths", data_dir), Input("the answers", answers)]
    )
    truths = _mme_truths(Path(data_dir))
    tasks: dict[str, list[str]] = {}
    for where, row in read_jsonl(answers):
        question_id = field(row, "question_id", (str,), where)
        task, file = question_id.split("/")[0], f"{Path(question_id).stem}.txt"
        question = " ".join(field(row, "prompt", (str,), where).replace(INSTRUCTION, "").split())
        question = question if YES_NO in question else f"{question} {YES_NO}"
        if (task, file, question) not in truths:
            raise BadSampleError(f"{where}: {data_dir} has no question {question!r} in {task}/{file}")
        written, truth = truths[task, file, question]
        response = " ".join(field(row, "text", (str,), where).split())  # a tab or line feed would break the table
        tasks.setdefault(task, []).append("\t".join((file, written, truth, response)) + "\n")
    for task, rows in tasks.items():
        replace_text(Path(output_dir) / f"{task}.txt", "".join(rows))
    return Path(output_dir)


def _mme_truths(data_dir: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """By task, file and question with single blanks: the question as written and its ground truth."""
    truths = {}
    for path in sorted(data_dir.glob("*/*.txt")) + sorted(data_dir.glob("*/questions_answers_YN/*.txt")):
        task = path.relative_to(data_dir).parts[0]
        for number, line in enumerate(data_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            question, tab, truth = line.partition("\t")
            if not tab:
                raise BadSampleError(f"{path}:{number}: no tab between question and ground truth")
            truths[task, path.name, " ".join(question.split())] = question, truth.strip()
    if not truths:
        raise BadSampleError(f"{data_dir}: no ground truths here, wanted <task>/<image>.txt")
    return truths

"""From an answers file to the file that a benchmark's server or own program reads (upstream `scripts/convert_*.py`).

The written files are equal to upstream's byte for byte. `scripts/convert_<benchmark>_for_*.py` are the programs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError
from llava.eval.answering.questions import field, read_jsonl
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.eval.scoring.matching import Sides, by_id, check_fit, id_of, listed, read_pairs
from llava.runtime.files import data_text
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file, refuse_folder

VQAV2_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"
"""All questions of the test split; the server wants an entry for each, also where only test-dev was answered."""

INSTRUCTION = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."


def read_answers_leniently(path: str | Path) -> tuple[list[tuple[int | str, str]], int]:
    """Id and answer text of each row, in file order, and the number of lines that are not JSON.

    A broken line is left out with a warning, as upstream does with the remains of a killed run.

    Raises:
        BadSampleError: the file is missing, or a row lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise BadSampleError(f"{path}: no such file")
    pairs: list[tuple[int | str, str]] = []
    broken = 0
    for number, line in enumerate(data_text(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            print(f"warning: {where}: not valid JSON, left out ({error})", file=sys.stderr)
            broken += 1
            continue
        pairs.append((field(row, "question_id", (int, str), where), field(row, "text", (str,), where)))
    return pairs, broken


def _normalised(
    questions: str | Path,
    answers: str | Path,
    entry: Callable[[str, dict[str, Any], str | None], dict[str, Any]],
    asked: Sequence[Any] | None,
    lenient: bool | None,
) -> list[dict[str, Any]]:
    """One entry for each question, in their order, with the normalised answer or None; prints upstream's counts.

    `asked` are the ids that must have an answer; None: those of all questions.
    """
    rows = [(field(row, "question_id", (int, str), where), where, row) for where, row in read_jsonl(questions)]
    pairs, broken = read_answers_leniently(answers)
    texts = by_id(pairs)
    everything = [key for key, _, _ in rows]
    print(f"total results: {len(texts)}, total split: {len(rows)}, error_line: {broken}")
    sides = Sides(answers, questions)
    check_fit(everything if asked is None else asked, [key for key, _ in pairs], sides, lenient=lenient)
    unknown = by_id((key, key) for key in asked or ()).keys() - by_id((key, key) for key in everything).keys()
    if unknown:
        raise BadSampleError(
            f"{questions}: does not have {len(unknown)} questions of the split: {listed(sorted(unknown))}"
        )
    processor = EvalAIAnswerProcessor()
    entries = []
    for key, where, row in rows:
        text = texts.get(id_of(key))
        entries.append(entry(where, row, None if text is None else processor(text)))
    return entries


def ids_of(questions: str | Path) -> list[int | str]:
    """The ids of a question file.

    Raises:
        BadSampleError: the file is missing or broken.
    """
    return [field(row, "question_id", (int, str), where) for where, row in read_jsonl(questions)]


def vqav2(
    questions: str | Path,
    answers: str | Path,
    output: str | Path,
    asked: Sequence[Any] | None = None,
    *,
    lenient: bool = False,
) -> Path:
    """VQAv2: a list of question_id and normalised answer, empty where nothing was asked.

    Args:
        questions: all that the server wants an entry for.
        answers: the answers file.
        output: file to write.
        asked: ids of those that must be answered, as the split test-dev of all test questions; None: all.
        lenient: the answer is empty also where one is missing; those to no question are left out.

    Returns:
        the written file.

    Raises:
        BadSampleError: a file is missing or broken, or (without `lenient`) answers and questions do not fit.
    """
    refuse_file("the output", output, [Input("the questions", questions), Input("the answers", answers)])

    def entry(where: str, row: dict[str, Any], answer: str | None) -> dict[str, Any]:
        return {"question_id": row["question_id"], "answer": answer or ""}

    return replace_text(output, json.dumps(_normalised(questions, answers, entry, asked, lenient)))


def vizwiz(questions: str | Path, answers: str | Path, output: str | Path) -> Path:
    """VizWiz: a list of image and normalised answer.

    Returns:
        the written file.

    Raises:
        BadSampleError: a file is missing or broken, or answers and questions do not fit.
    """
    refuse_file("the output", output, [Input("the questions", questions), Input("the answers", answers)])

    def entry(where: str, row: dict[str, Any], answer: str | None) -> dict[str, Any]:
        return {"image": field(row, "image", (str,), where), "answer": answer}

    return replace_text(output, json.dumps(_normalised(questions, answers, entry, None, None)))


def _texts(answers: str | Path, questions: str | Path | None) -> list[tuple[int | str, str]]:
    """Id and text of each row, compared with the questions if they are given.

    Without them there is a warning where a question is answered twice, which upstream takes as it is.

    Raises:
        BadSampleError: a file is missing, broken or empty, or they do not fit.
    """
    pairs = read_pairs(answers)
    if not pairs:
        raise BadSampleError(f"{answers}: no answers here")
    answered = [key for key, _ in pairs]
    if questions is None:
        check_fit(list(by_id(pairs)), answered, Sides(answers, answers), lenient=True)
    else:
        check_fit(ids_of(questions), answered, Sides(answers, questions))
    return pairs


def gqa(answers: str | Path, output: str | Path, questions: str | Path | None = None) -> Path:
    """GQA: a list of questionId (text, as GQA's program wants it) and prediction, in lower case, without last periods.

    Args:
        answers: the answers file.
        output: file to write.
        questions: what was asked; None: whether all is answered cannot be seen.

    Raises:
        BadSampleError: a file is missing or broken, or answers and questions do not fit.
    """
    refuse_file("the output", output, [Input("the answers", answers), Input("the questions", questions)])
    predictions = [
        {"questionId": id_of(key), "prediction": text.rstrip(".").lower()} for key, text in _texts(answers, questions)
    ]
    return replace_text(output, json.dumps(predictions))


def mmvet(answers: str | Path, output: str | Path, questions: str | Path | None = None) -> Path:
    """MM-Vet: an object of `v1_<id>` and answer.

    Args:
        answers: the answers file.
        output: file to write.
        questions: what was asked; None: whether all is answered cannot be seen.

    Raises:
        BadSampleError: a file is missing or broken, or answers and questions do not fit.
    """
    refuse_file("the output", output, [Input("the answers", answers), Input("the questions", questions)])
    texts = {f"v1_{id_of(key)}": text for key, text in _texts(answers, questions)}
    return replace_text(output, json.dumps(texts, indent=2))


def mme(data_dir: str | Path, answers: str | Path, output_dir: str | Path, *, lenient: bool = False) -> Path:
    """MME: a folder with one file per task, lines of image file, question, ground truth and response.

    Args:
        data_dir: `MME_Benchmark_release_version`: a folder per task with `<image>.txt`, beside the images or in
            `questions_answers_YN/`; lines of question and ground truth with a tab between them.
        answers: the question_id of a row is `<task>/<image file>`.
        output_dir: what `llava.eval.eval_mme` and the benchmark's own tool read.
        lenient: write the answers that are there.

    Raises:
        BadSampleError: a file is broken, an answer's question is not among the ground truths, or (without `lenient`)
            one of the ground truths has no answer.
    """
    refuse_folder(
        "the output folder", output_dir, [Input("the ground truths", data_dir), Input("the answers", answers)]
    )
    truths = _mme_truths(Path(data_dir))
    tasks: dict[str, list[str]] = {}
    answered = []
    for where, row in read_jsonl(answers):
        question_id = field(row, "question_id", (str,), where)
        task, file = question_id.split("/")[0], f"{Path(question_id).stem}.txt"
        question = " ".join(field(row, "prompt", (str,), where).replace(INSTRUCTION, "").split())
        question = question if YES_NO in question else f"{question} {YES_NO}"
        if (task, file, question) not in truths:
            raise BadSampleError(f"{where}: {data_dir} has no question {question!r} in {task}/{file}")
        answered.append(f"{task}/{file}: {question}")
        written, truth = truths[task, file, question]
        response = " ".join(field(row, "text", (str,), where).split())  # a tab or line feed would break the table
        tasks.setdefault(task, []).append("\t".join((file, written, truth, response)) + "\n")
    asked = [f"{task}/{file}: {question}" for task, file, question in truths]
    check_fit(asked, answered, Sides(answers, data_dir), lenient=lenient, repeats=True)
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

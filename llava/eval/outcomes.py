"""What becomes of the answers to each benchmark: scores, and files for servers. Used by `llava/eval/benchmarks.py`.

Every function takes a finished `BenchmarkRun` and gives an `Outcome`; the mathematics is in the `eval_*` modules.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.eval import (
    eval_captions,
    eval_chartqa,
    eval_gqa,
    eval_mme,
    eval_pope,
    eval_qbench,
    eval_science_qa,
    eval_seed,
)
from llava.eval import eval_textvqa as textvqa_module
from llava.eval.answering.answers import Row, Task
from llava.eval.answering.questions import read_json, read_questions
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.scoring import mmbench, submission
from llava.eval.scoring.matching import id_of
from llava.runtime.output import replace_text
from llava.runtime.recognize import refuse_foreign


@dataclass(frozen=True)
class BenchmarkRun:
    """A finished answers file and what belongs to it.

    Attributes:
        data: folder of the benchmark.
        questions: file or folder that the tasks were read from.
        answers: the answers file.
        split: name of the split.
        model: name of the model.
        tasks: what was asked.
        rows: the answer rows, in the same order.
        complete: False after `--limit`: files for servers would lack answers.
    """

    data: Path
    questions: Path
    answers: Path
    split: str
    model: str
    tasks: Sequence[Task]
    rows: Sequence[Row]
    complete: bool

    @property
    def texts(self) -> dict[Any, str]:
        """Answer text by question_id."""
        return {row["question_id"]: row["text"] for row in self.rows}


@dataclass(frozen=True)
class Outcome:
    """Scores and files.

    Attributes:
        metrics: name and value, in the units in which papers give them (percent, but MME's points); the first is the
            headline. Empty if only a server can score.
        samples: what became of each question, where that is known here.
        files: written files.
        note: what to do next.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    note: str = ""


INCOMPLETE = Outcome(note="no file for the server is written with --limit: it wants all answers")


def sample(task: Task, row: Row, label: Any, score: float) -> dict[str, Any]:
    """One line of the log of samples."""
    return {"question_id": task.question_id, "prompt": task.prompt, "text": row["text"], "label": label, "score": score}


def vqav2(run: BenchmarkRun) -> Outcome:
    """A file for the server."""
    if not run.complete:
        return INCOMPLETE
    path = run.data / "answers_upload" / run.split / f"{run.model}.json"
    asked = [task.question_id for task in run.tasks]
    submission.vqav2(run.data / submission.VQAV2_QUESTIONS, run.answers, path, asked)
    return Outcome(files=[path], note="upload it to the VQAv2 server (EvalAI)")


def vizwiz(run: BenchmarkRun) -> Outcome:
    """A file for the server."""
    if not run.complete:
        return INCOMPLETE
    path = submission.vizwiz(run.questions, run.answers, run.data / "answers_upload" / f"{run.model}.json")
    return Outcome(files=[path], note="upload it to the VizWiz server (EvalAI)")


def gqa(run: BenchmarkRun) -> Outcome:
    """Accuracy, and the file of predictions for GQA's own program."""
    path = submission.gqa(run.answers, run.answers.with_name(f"{run.answers.stem}_predictions.json"))
    ids = {id_of(task.question_id) for task in run.tasks}
    questions = run.data / "data" / "testdev_balanced_questions.json"
    score = eval_gqa.evaluate(questions, path, None if run.complete else ids)
    metrics = {"accuracy": 100 * score.accuracy}
    metrics |= {name: 100 * value for name in ("binary", "open") if (value := getattr(score, name)) is not None}
    labels = {key: row["answer"] for key, row in read_json(questions, dict).items() if key in ids}
    predictions = {row["questionId"]: row["prediction"] for row in json.loads(path.read_text(encoding="utf-8"))}
    samples = [
        sample(task, row, labels[key], float(predictions[key] == labels[key]))
        for task, row in zip(run.tasks, run.rows, strict=True)
        if (key := id_of(task.question_id)) in labels
    ]
    return Outcome(metrics, samples, [path])


def textvqa(run: BenchmarkRun) -> Outcome:
    """Soft accuracy."""
    pairs = textvqa_module.pair(run.data / "TextVQA_0.5.1_val.json", run.answers, lenient=not run.complete)
    evaluator = TextVQAAccuracyEvaluator()
    samples = [
        sample(task, row, list(prediction["gt_answers"]), evaluator.score(prediction))
        for task, (row, prediction) in zip(run.tasks, pairs, strict=True)
    ]
    return Outcome({"accuracy": 100 * sum(one["score"] for one in samples) / len(samples)}, samples)


def science_qa(run: BenchmarkRun) -> Outcome:
    """Accuracy, over all questions and over those with an image."""
    score = eval_science_qa.evaluate(run.data, run.answers, run.split, only_answered=not run.complete)
    output, result = (run.answers.with_name(f"{run.answers.stem}_{kind}") for kind in ("output.jsonl", "result.json"))
    replace_text(output, json.dumps(score.output, indent=2))
    replace_text(result, json.dumps(score.result, indent=2))
    metrics = {"accuracy": score.result["acc"]}
    if score.image_n:
        metrics["image accuracy"] = 100 * score.image_correct / score.image_n
    samples = [one | {"score": float(name == "correct")} for name, rows in score.output.items() for one in rows]
    return Outcome(metrics, samples, [output, result])


def pope(run: BenchmarkRun) -> Outcome:
    """F1 and accuracy, averaged over the categories, and of each category."""
    scores = eval_pope.evaluate(run.data / "coco", run.questions, run.answers, lenient=not run.complete)
    metrics = {
        "F1": 100 * sum(one.f1 for one in scores.values()) / len(scores),
        "accuracy": 100 * sum(one.accuracy for one in scores.values()) / len(scores),
    }
    for category, one in scores.items():
        metrics |= {f"F1 {category}": 100 * one.f1, f"accuracy {category}": 100 * one.accuracy}
    return Outcome(metrics, _pope_samples(run))


def _pope_samples(run: BenchmarkRun) -> list[dict[str, Any]]:
    """Each answer with its label; they are paired by their order within a category."""
    labels = {
        path.stem.removeprefix(eval_pope.PREFIX): iter(eval_pope.read_labels(path))
        for path in (run.data / "coco").glob(f"{eval_pope.PREFIX}*{eval_pope.SUFFIX}")
    }
    categories = {question.question_id: question.category for question in read_questions(run.questions)}
    samples = []
    for task, row in zip(run.tasks, run.rows, strict=True):
        label = next(labels[categories[task.question_id]])
        right = eval_pope.says_yes(row["text"]) == label
        samples.append(sample(task, row, "yes" if label else "no", float(right)))
    return samples


def mme(run: BenchmarkRun) -> Outcome:
    """Points of perception and cognition, and of each task."""
    folder = run.data / "eval_tool" / "answers" / run.model
    earlier = sorted(folder.glob("*.txt"))
    for old in earlier:  # one that this did not write is reported before any is deleted
        refuse_foreign(old, "image\tquestion\ttruth\tresponse\n")
    for old in earlier:
        old.unlink()
    data = run.data / "MME_Benchmark_release_version"
    submission.mme(data, run.answers, folder, lenient=not run.complete)
    scores = eval_mme.evaluate(folder, data, lenient=not run.complete)
    print(eval_mme.table(scores))
    metrics = {group.lower(): total for group, total in eval_mme.totals(scores).items()}
    return Outcome(metrics | {task: one.score for task, one in scores.items()}, files=[folder])


def mmbench_sheet(run: BenchmarkRun) -> Outcome:
    """A spreadsheet for the server; where the file has answers, the share of right letters as well."""
    table = mmbench.read_table(run.questions)
    samples = []
    if "answer" in table.columns:
        labels = dict(zip(table["index"], table["answer"], strict=True))
        for task, row in zip(run.tasks, run.rows, strict=True):
            letter = eval_science_qa.parse_answer(row["text"], mmbench.LETTERS)
            samples.append(sample(task, row, labels[task.question_id], float(letter == labels[task.question_id])))
    metrics = {"letter accuracy": 100 * sum(one["score"] for one in samples) / len(samples)} if samples else {}
    if not run.complete:
        return Outcome(metrics, samples, note=INCOMPLETE.note)
    path = run.data / "answers_upload" / run.split / f"{run.model}.xlsx"
    mmbench.write_spreadsheet(run.questions, run.answers, path)
    return Outcome(metrics, samples, [path], "upload it to the MMBench server; only its score is the benchmark's")


def seed(run: BenchmarkRun) -> Outcome:
    """Accuracy of all, image and video questions, and of each type."""
    annotation = read_json(run.data / "SEED-Bench.json", dict)
    asked = {id_of(task.question_id) for task in run.tasks}
    if not run.complete:
        annotation["questions"] = [row for row in annotation["questions"] if id_of(row["question_id"]) in asked]
    answers = eval_seed.read_answers(annotation, run.answers)
    score = eval_seed.score(annotation, answers)
    metrics = {"accuracy": 100 * score.total}
    metrics |= {f"{name} accuracy": 100 * value for name, value in (score.by_kind | score.by_type).items()}
    samples = [
        {"question_id": row["question_id"], "text": text, "label": row["answer"], "score": float(text == row["answer"])}
        for row, text in zip(annotation["questions"], answers, strict=True)
    ]
    if not run.complete:
        return Outcome(metrics, samples, note=INCOMPLETE.note)
    path = run.data / "answers_upload" / f"{run.model}.jsonl"
    eval_seed.write_upload(annotation, answers, path)
    return Outcome(metrics, samples, [path])


def mmvet(run: BenchmarkRun) -> Outcome:
    """A file for the benchmark's evaluator, which asks GPT-4."""
    questions = run.questions if run.complete else None
    path = submission.mmvet(run.answers, run.data / "results" / f"{run.model}.json", questions)
    return Outcome(files=[path], note="score it with MM-Vet's evaluator")


def llava_bench(run: BenchmarkRun) -> Outcome:
    """Nothing yet: another model compares these answers with GPT-4's."""
    return Outcome(note="review them with llava.eval.eval_gpt_review_bench, then llava.eval.summarize_gpt_review")


def qbench(run: BenchmarkRun) -> Outcome:
    """Share of right letters, where the file has the right answers (the dev split)."""
    scores = eval_qbench.score(run.rows)
    if scores is None:
        return Outcome(note="this split has no public answers; submit the answers file to Q-Bench")
    samples = [
        sample(task, {"text": row["response"]}, row["correct_ans"], score)
        for task, row, score in zip(run.tasks, run.rows, scores, strict=True)
    ]
    return Outcome({"letter accuracy": 100 * sum(scores) / len(scores)}, samples)


def chartqa(run: BenchmarkRun) -> Outcome:
    """Relaxed accuracy of all, human and augmented questions."""
    scores = eval_chartqa.score(run.tasks, run.texts)
    samples = [
        sample(task, row, label, float(eval_chartqa.relaxed_match(row["text"], label)))
        for task, row in zip(run.tasks, run.rows, strict=True)
        if (label := task.extra["label"]) is not None
    ]
    return Outcome({f"relaxed accuracy {name}": 100 * value for name, value in scores.items()}, samples)


def captions(run: BenchmarkRun) -> Outcome:
    """CIDEr and BLEU-4."""
    scores, each = eval_captions.score(run.tasks, run.texts)
    samples = [
        sample(task, row, task.extra["captions"], one) for task, row, one in zip(run.tasks, run.rows, each, strict=True)
    ]
    return Outcome({name: 100 * value for name, value in scores.items()}, samples)

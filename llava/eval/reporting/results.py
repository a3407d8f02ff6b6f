"""The result of a benchmark as JSON and as one line for a paper."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.eval.answering.answers import AnswersFile, Task
from llava.eval.answering.prompts import build_prompt, image_marker
from llava.eval.answering.runner import Speed
from llava.eval.benchmarks import Benchmark
from llava.eval.outcomes import Outcome
from llava.runtime.output import replace_text
from llava.runtime.program import package_versions


def beside(answers: AnswersFile, ending: str) -> Path:
    """A file beside the answers file, with its name and another ending."""
    return answers.path.with_name(f"{answers.path.stem}{ending}")


def write_samples(answers: AnswersFile, outcome: Outcome) -> None:
    """Write what became of each question, if single answers were scored."""
    if outcome.samples:
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outcome.samples)
        print(f"every answer with its score: {replace_text(beside(answers, '.samples.jsonl'), lines)}")


def shown_prompt(task: Task, conv_mode: str) -> str:
    """The text that the model continues, as `--conv-mode` makes it; without a tokenizer only of named templates."""
    message = f"{image_marker(False)}\n" * len(task.images) + task.question
    return message if conv_mode == "tokenizer" else build_prompt(message, conv_mode)


def report(
    args: argparse.Namespace,
    benchmark: Benchmark,
    tasks: Sequence[Task],
    answers: AnswersFile,
    outcome: Outcome,
    speed: Speed | None,
) -> dict[str, Any]:
    """Write `<answers>.result.json`, say where it is and what comes next.

    Returns:
        what the file holds: scores, files, first prompt, the settings that decide the answers (dtype, seed, template,
        weights), the command's options, versions, and the speed of this run (None if it asked nothing).
    """
    result = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "split": args.split,
        "model": args.experiment,
        "questions": len(tasks),
        "complete": args.limit is None,
        "metrics": outcome.metrics,
        "answers_file": str(answers.path),
        "files": [str(path) for path in outcome.files],
        "first_prompt": shown_prompt(tasks[0], answers.settings["conv_mode"]),
        "settings": answers.settings,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": package_versions(),
        "speed": asdict(speed) if speed else None,
    }
    path = replace_text(beside(answers, ".result.json"), json.dumps(result, indent=2) + "\n")
    for file in outcome.files:
        print(f"written: {file}")
    print(f"written: {path}" + (f"; {speed}" if speed else ""))
    if outcome.note:
        print(f"next: {outcome.note}")
    return result


def summary_line(result: dict[str, Any]) -> str:
    """One line for a paper or a notebook."""
    settings = result["settings"]
    scores = ", ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items()) or "scored by its server"
    sampling = f"temperature {settings['temperature']}, seed {settings['seed']}"
    how = [settings["conv_mode"], sampling if settings["temperature"] else "greedy"]
    how += [f"{settings['num_beams']} beams"] if settings["num_beams"] > 1 else []
    how += [settings["torch_dtype"].removeprefix("torch."), f"transformers {result['versions']['transformers']}"]
    part = "" if result["complete"] else ", NOT THE WHOLE BENCHMARK"
    asked = f"{result['split']}, {result['questions']} questions{part}"
    return " | ".join((f"{result['title']} ({asked})", result["model"], scores, ", ".join(how)))

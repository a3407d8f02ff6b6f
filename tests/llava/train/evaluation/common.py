"""Runs with evaluations: rows to measure on, questions with labels, and what a run has logged of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.golden import golden_dir
from tests.llava.train.test_training import command_line

DATA = golden_dir("llava") / "data"
ROWS = json.loads((DATA / "finetune.json").read_text())


def rows_with_tasks(folder: Path) -> Path:
    """The rows of the tiny data set, each with a task of its own kind: those with an image, and those without."""
    rows = [row | {"task": "seen" if "image" in row else "told"} for row in ROWS]
    path = folder / "held_out.json"
    path.write_text(json.dumps(rows))
    return path


def questions(folder: Path, count: int = 5) -> Path:
    """Questions with labels, of which some have an image."""
    lines = []
    for number, row in enumerate(ROWS[:count]):
        image = {"image": row["image"]} if isinstance(row.get("image"), str) else {}
        asked = {"question_id": number, "text": f"What is it, {number}?", "label": "dog"}
        lines.append(asked | {"category": "seen" if image else "told"} | image)
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluated_line(output: Path, folder: Path, **options: Any) -> list[str]:
    """The command line of a run that is evaluated after every second update, on rows and questions."""
    shared = {
        "eval_data_path": rows_with_tasks(folder),
        "eval_questions": questions(folder),
        "eval_max_new_tokens": 4,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
    }
    return command_line(output, **(shared | options))


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """What the evaluations of a run have logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "eval_runtime" in entry]

"""ScienceQA's problems as conversations for training and questions for evaluation (upstream `convert_sqa_to_llava.py`).

A format is a code for the input and one for the output with a hyphen between them, as `QCM-LEA`. Q question, C context,
M the choices, L lecture, E explanation (the problem's `solution`), A answer. Texts are upstream's byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import read_json
from llava.eval.scoring.matching import id_of, listed
from llava.runtime.output import replace_text

OPTIONS = "ABCDE"
INPUTS = ("CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM")
OUTPUTS = {
    "A": "The answer is {A}.",
    # Upstream: in these two codes, lecture and solution change places.
    "AL": "The answer is {A}. BECAUSE: {E}",
    "AE": "The answer is {A}. BECAUSE: {L}",
    "ALE": "The answer is {A}. BECAUSE: {L} {E}",
    "AEL": "The answer is {A}. BECAUSE: {E} {L}",
    "LA": "{L} The answer is {A}.",
    "EA": "{E} The answer is {A}.",
    "LEA": "{L} {E} The answer is {A}.",
    "ELA": "{E} {L} The answer is {A}.",
}
LEPA = "LEPA"
BECAUSE = "BECAUSE:"
QUESTION_MARK, ANSWER_MARK = "Question: ", "Answer: "


def check_format(prompt_format: str) -> tuple[str, str]:
    """The codes of input and output.

    Raises:
        FlagError: there is no such code, or no hyphen between them.
    """
    given, hyphen, wanted = prompt_format.partition("-")
    if not hyphen or given not in INPUTS or wanted not in (*OUTPUTS, LEPA):
        raise FlagError(
            f"--prompt-format {prompt_format}: must be one of {', '.join(INPUTS)}, a hyphen, and one of "
            f"{', '.join((*OUTPUTS, LEPA))}"
        )
    return given, wanted


def build_texts(problem: dict[str, Any], prompt_format: str) -> tuple[str, str]:
    """What the user says and what the model is to say about a problem.

    Args:
        problem: question, choices, answer (index), hint, lecture, solution.
        prompt_format: see the top of this file.

    Raises:
        FlagError: unknown format.
    """
    given, wanted = check_format(prompt_format)
    parts = {
        "Q": problem["question"],
        "C": problem["hint"].strip() or "N/A",
        "M": " ".join(f"({letter}) {choice}" for letter, choice in zip(OPTIONS, problem["choices"], strict=False)),
        # Some texts hold a backslash and an n where a line ends.
        "L": problem["lecture"].replace("\\n", "\n"),
        "E": problem["solution"].replace("\\n", "\n"),
        "A": OPTIONS[problem["answer"]],
    }
    asked = _tidy(_input(given, parts))
    answer = _tidy(_lepa(parts) if wanted == LEPA else ANSWER_MARK + OUTPUTS[wanted].format(**parts))
    # Upstream removes the mark by a replacement that also hits later occurrences.
    asked = asked.replace(QUESTION_MARK, "") if asked.startswith(QUESTION_MARK) else asked
    return asked, answer.replace(ANSWER_MARK, "") if answer.startswith(ANSWER_MARK) else answer


def _input(code: str, parts: dict[str, str]) -> str:
    """Lines in the order of the letters; lecture and explanation share one."""
    because = " ".join(parts[letter] for letter in code if letter in "LE")
    lines = {"Q": f"Question: {parts['Q']}", "C": f"Context: {parts['C']}", "M": f"Options: {parts['M']}"}
    order = dict.fromkeys("B" if letter in "LE" else letter for letter in code)
    return "\n".join((lines | {"B": f"{BECAUSE} {because}"})[letter] for letter in order) + "\n"


def _lepa(parts: dict[str, str]) -> str:
    lines = [f"LECTURE: {parts['L']}"] if parts["L"].strip() else []
    lines += [f"SOLUTION: {parts['E']}"] if parts["E"].strip() else []
    return "\n".join([*lines, "###", f"ANSWER: {parts['A']}."])


def _tidy(text: str) -> str:
    text = text.replace("  ", " ").strip()
    return text.replace(BECAUSE, "").strip() if text.endswith(BECAUSE) else text


def read_split(base_dir: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """The problems of a split by id, in its order.

    Raises:
        BadSampleError: a file is missing or broken, there is no such split, or it has a question without a problem.
    """
    base = Path(base_dir)
    splits = read_json(base / "pid_splits.json", dict)
    if split not in splits:
        raise BadSampleError(f"{base / 'pid_splits.json'}: no split '{split}'; it has {sorted(splits)}")
    problems = read_json(base / "problems.json", dict)
    absent = [key for key in splits[split] if id_of(key) not in problems]
    if absent:
        raise BadSampleError(
            f"{base / 'problems.json'}: has no problem for {len(absent)} questions of split '{split}': {listed(absent)}"
        )
    return {id_of(key): problems[id_of(key)] for key in splits[split]}


def convert_to_llava(base_dir: str | Path, split: str, prompt_format: str = "QCM-LEA") -> Path:
    """Write `llava_<split>_<format>.json`: conversations, with `<image>` behind the question of a problem with one.

    Raises:
        BadSampleError: see `read_split`.
        FlagError: unknown format.
    """
    check_format(prompt_format)
    rows = []
    for key, problem in read_split(base_dir, split).items():
        asked, answer = build_texts(problem, prompt_format)
        image = {"image": f"{key}/{problem['image']}"} if problem["image"] is not None else {}
        turns = (("human", f"{asked}\n<image>" if image else asked), ("gpt", answer))
        conversations = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": key, **image, "conversations": conversations})
    print(f"Number of samples: {len(rows)}")
    return replace_text(Path(base_dir) / f"llava_{split}_{prompt_format}.json", json.dumps(rows, indent=2))


def convert_to_jsonl(base_dir: str | Path, split: str, prompt_format: str = "QCM-LEPA") -> Path:
    """Write `scienceqa_<split>_<format>.jsonl`: rows of id, image, instruction and output.

    Raises:
        BadSampleError: see `read_split`.
        FlagError: unknown format.
    """
    check_format(prompt_format)
    rows: Sequence[dict[str, Any]] = [
        _jsonl_row(key, problem, prompt_format) for key, problem in read_split(base_dir, split).items()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return replace_text(Path(base_dir) / f"scienceqa_{split}_{prompt_format}.jsonl", text)


def _jsonl_row(key: str, problem: dict[str, Any], prompt_format: str) -> dict[str, Any]:
    asked, answer = build_texts(problem, prompt_format)
    image = {"image": f"{key}/{problem['image']}"} if problem["image"] is not None else {}
    return {"id": key, **image, "instruction": f"{asked}\n<image>" if image else asked, "output": answer}

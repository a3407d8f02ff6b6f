"""ScienceQA problems as prompts and answers (LaVIN's `util/base_prompt.py`), and the prompt of instructions.

A format is named by two halves, `QCM-ALE`: the lines of the prompt in their order, and what the answer holds. Letters:
Q question, C context, M choices, L lecture, E explanation, A the letter of the right choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = (
    *("CQM-A", "CQM-LA", "CQM-EA", "CQM-LEA", "CQM-ELA", "CQM-AL", "CQM-AE", "CQM-ALE"),
    *("QCM-A", "QCM-LA", "QCM-EA", "QCM-LEA", "QCM-ELA", "QCM-AL", "QCM-AE", "QCM-ALE"),
    *("QCML-A", "QCME-A", "QCMLE-A", "QCLM-A", "QCEM-A", "QCLEM-A", "QCML-AE"),
)
"""Values of `--prompt_format`."""

OPTIONS = tuple("ABCDE")
"""Letters of the choices."""

RESPONSE = "Response:"
REASON = "BECAUSE:"

Problem = Mapping[str, Any]
"""An entry of `problems.json`."""

SOURCES = {"L": ("lecture",), "E": ("solution",), "LE": ("lecture", "solution"), "EL": ("solution", "lecture")}
"""What the letters of a format stand for, in their order."""

AFTER_ANSWER = SOURCES | {"L": ("solution",), "E": ("lecture",)}
"""Behind the answer the original has taken the two single texts for each other; its models were trained so."""


def one_blank(text: str) -> str:
    """Each pair of blanks as one, in a single pass from left to right: three become two."""
    return text.replace("  ", " ")


def instruction_prompt(instruction: str) -> str:
    """The prompt of a question to the chatbot, as in its training data."""
    return one_blank(f"Instruction: {instruction}\n{RESPONSE}")


def context_of(problem: Problem, caption: str | None) -> str:
    """The hint and, if captions are used, the caption of the image."""
    return f"{problem['hint']} {caption or ''}".strip() or "N/A"


def choices_of(problem: Problem, options: Sequence[str] = OPTIONS) -> str:
    """The choices with their letters, on one line."""
    letters = options[: len(problem["choices"])]
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, problem["choices"], strict=True))


def _texts(problem: Problem, keys: Sequence[str]) -> str:
    # Line feeds become the two characters that Python writes for them.
    return " ".join(problem[key].replace("\n", "\\n") for key in keys)


def _input_lines(problem: Problem, half: str, caption: str | None, options: Sequence[str]) -> str:
    """The prompt without the word that opens the answer; every line ends in a line feed."""
    lines = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {context_of(problem, caption)}",
        "M": f"Options: {choices_of(problem, options)}",
    }
    lines |= {letters: f"{REASON} {_texts(problem, keys)}" for letters, keys in SOURCES.items()}
    return "".join(f"{lines[part]}\n" for part in re.findall("LE|[CQMLE]", half))


def _output(problem: Problem, half: str, options: Sequence[str]) -> str:
    answer = f"The answer is {options[problem['answer']]}."
    before, _, after = half.partition("A")
    if after:
        return f"{answer} {REASON} {_texts(problem, AFTER_ANSWER[after])}"
    return f"{_texts(problem, SOURCES[before])} {answer}" if before else answer


def build_prompt(
    problem: Problem, prompt_format: str, *, caption: str | None = None, options: Sequence[str] = OPTIONS
) -> tuple[str, str]:
    """Prompt and answer of one problem.

    Args:
        problem: entry of `problems.json`.
        prompt_format: one of `FORMATS`.
        caption: caption of the image, None where captions are not used.
        options: letters of the choices.
    """
    before, _, after = prompt_format.partition("-")
    prompt = f"\n{_input_lines(problem, before, caption, options)}{RESPONSE}"
    return one_blank(prompt).strip(), one_blank(_output(problem, after, options)).strip()

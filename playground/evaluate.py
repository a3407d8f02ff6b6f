"""Measuring a model on the playground's question files, with the programs of `llava.eval`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydralora.model import record_routing
from llava.data.images import load_image
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import load_model
from llava.eval.answering.questions import Question, read_questions
from llava.eval.answering.runner import answer_batch, load_images, make_prompt
from llava.eval.model_vqa_loader import main as answer_questions
from llava.eval.model_vqa_loader import make_task
from llava.eval.score import ALL, Score, report

CONV_MODE = "v1"
BATCH_SIZE = 30
MAX_NEW_TOKENS = 8
"""Every answer of the playground is one word; the limit also ends the rambling of a model that knows nothing."""


@dataclass(frozen=True)
class Result:
    """Answers to one question file and their scores.

    Attributes:
        questions: of the file.
        answers: text by question_id.
        scores: by task family, and under `all` together.
    """

    questions: list[Question]
    answers: dict[int | str, str]
    scores: dict[str, Score]

    @property
    def accuracy(self) -> float:
        """Share of right answers over all questions, in [0, 1]."""
        return self.scores[ALL].accuracy


def evaluate(model: Path, model_base: Path | None, question_file: Path, images: Path, answers_file: Path) -> Result:
    """Answer a question file greedily and score it by exact match.

    Args:
        model: checkpoint folder.
        model_base: its base, if the checkpoint holds only what was trained on top.
        question_file: with labels and categories.
        images: folder of its images.
        answers_file: where the answers go; earlier ones are replaced.
    """
    flags = {
        "model-path": model,
        "question-file": question_file,
        "image-folder": images,
        "answers-file": answers_file,
        "temperature": 0,
        "conv-mode": CONV_MODE,
        "batch-size": BATCH_SIZE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "device": "cpu",
    }
    if model_base is not None:
        flags["model-base"] = model_base
    answer_questions([*(part for name, value in flags.items() for part in (f"--{name}", str(value))), "--restart"])
    scores: dict[str, dict[str, Any]] = report(question_file, answers_file)["scores"]
    rows = [json.loads(line) for line in answers_file.read_text(encoding="utf-8").splitlines()]
    return Result(
        read_questions(question_file),
        {row["question_id"]: row["text"] for row in rows},
        {family: Score(**values) for family, values in scores.items()},
    )


def expert_shares(
    model: Path, model_base: Path, questions: list[Question], images: Path, per_family: int
) -> dict[str, list[list[float]]]:
    """How the routers spread the tokens of each task family over the experts.

    Args:
        model: checkpoint with routed MLP blocks.
        model_base: its base.
        questions: of several families.
        images: folder of their images.
        per_family: questions of each family that are looked at, one at a time, so that no padding is counted.

    Returns:
        For each family and decoder layer the mean probability of each expert over all prompt tokens.
    """
    loaded = load_model(str(model), str(model_base), device="cpu")
    one_token = GenerationOptions(temperature=0, max_new_tokens=1)
    chosen: dict[str, list[Question]] = {}
    for question in questions:
        if len(chosen.setdefault(question.category, [])) < per_family:
            chosen[question.category].append(question)
    shares = {}
    for family, members in chosen.items():
        collected: list[torch.Tensor] = []
        for question in members:
            task = make_task(question)
            shown = load_images(task, loaded, lambda name, where: load_image(images, name, row=where))
            with record_routing(loaded.model) as routing:
                answer_batch([make_prompt("0", task, loaded, CONV_MODE)], [shown], loaded, one_token)
            collected.append(torch.stack([passes[0][0].mean(dim=0) for passes in routing.values()]))  # (layers, E)
        shares[family] = torch.stack(collected).mean(dim=0).tolist()
    return shares

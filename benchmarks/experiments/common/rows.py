"""Training data and baselines, from the LLaVA-format NLVR files.

The files hold one question a row. Training rows are put together here: one image with several turns in random order,
so that one pass through the vision tower serves several answers. A scene is drawn in up to six orders of its three
boxes, and the files ask about different colours and shapes in each; counts, existence and majorities do not depend on
the order, so a scene's questions may be asked of any of its images. `questions_by_scene` checks that they agree.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import BadSampleError

Row = dict[str, Any]


class Asked(NamedTuple):
    """One question about one image.

    Attributes:
        image: name relative to the data folder.
        task: verify, count, exist or most.
        question: without the image token.
        answer: the label.
    """

    image: str
    task: str
    question: str
    answer: str


def read_train(path: Path) -> list[Asked]:
    """The rows of `train.json`.

    Raises:
        BadSampleError: a row does not have exactly one question and one answer.
    """
    asked = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        turns = row["conversations"]
        if [turn["from"] for turn in turns] != ["human", "gpt"]:
            raise BadSampleError(f"{path}, row {row['id']}: expected a question and an answer, got {len(turns)} turns")
        question = turns[0]["value"].removeprefix(f"{DEFAULT_IMAGE_TOKEN}\n")
        asked.append(Asked(row["image"], row["task"], question, turns[1]["value"]))
    return asked


def read_questions(path: Path) -> list[Asked]:
    """The rows of `val.jsonl`."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Asked(row["image"], row["category"], row["text"], row["label"]) for row in rows]


def scene_of(image: str) -> str:
    """The scene that an image shows: its name without the number of the box order."""
    return image.rpartition("-")[0]


def questions_by_scene(asked: Iterable[Asked]) -> dict[str, dict[str, dict[str, str]]]:
    """Answer by scene, task and question.

    Raises:
        BadSampleError: two box orders of one scene answer the same question differently.
    """
    scenes: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for one in asked:
        known = scenes[scene_of(one.image)][one.task].setdefault(one.question, one.answer)
        if known != one.answer:
            raise BadSampleError(
                f"{one.image}: '{one.question}' is answered '{one.answer}' here and '{known}' for another box order"
            )
    return scenes


def conversation_rows(asked: Sequence[Asked], turns: Mapping[str, int], count: int, seed: int) -> list[Row]:
    """LLaVA training rows: every image in turn, in a new random order each time, until there are `count` rows.

    Args:
        asked: the questions to draw from.
        turns: for each task wanted, the most questions of it that one row may hold.
        count: number of rows.
        seed: of the order of images, the choice of questions and the order of turns.

    Raises:
        BadSampleError: a scene has no question of the wanted tasks.
    """
    random = Random(f"{seed}/rows")
    scenes = questions_by_scene(asked)
    images = sorted({one.image for one in asked})
    rows: list[Row] = []
    while len(rows) < count:
        random.shuffle(images)
        for image in images[: count - len(rows)]:
            chosen: list[tuple[str, str]] = []
            for task, most in turns.items():
                known = sorted(scenes[scene_of(image)].get(task, {}).items())
                chosen += random.sample(known, min(most, len(known)))
            if not chosen:
                raise BadSampleError(f"{image}: its scene has no question of {sorted(turns)}")
            random.shuffle(chosen)
            rows.append({"id": f"{len(rows)}", "image": image, "conversations": _turns(chosen)})
    return rows


def _turns(chosen: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for index, (question, answer) in enumerate(chosen):
        prefix = f"{DEFAULT_IMAGE_TOKEN}\n" if index == 0 else ""
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return turns


def majority_accuracy(questions: Sequence[Asked]) -> dict[str, float]:
    """For each task, the share of its most frequent label among `questions`."""
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for one in questions:
        labels[one.task][one.answer] += 1
    return {task: max(counts.values()) / counts.total() for task, counts in labels.items()}


def blind_accuracy(train: Sequence[Asked], questions: Sequence[Asked]) -> dict[str, float]:
    """Accuracy of the most frequent training answer to the very same question, without the image.

    A question that training never asked gets the most frequent training answer of its task. Among equally frequent
    answers the one seen first counts.
    """
    same: dict[str, Counter[str]] = defaultdict(Counter)
    of_task: dict[str, Counter[str]] = defaultdict(Counter)
    for one in train:
        same[one.question][one.answer] += 1
        of_task[one.task][one.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for one in questions:
        guess = (same.get(one.question) or of_task[one.task]).most_common(1)[0][0]
        right[one.task].append(guess == one.answer)
    return {task: sum(hits) / len(hits) for task, hits in right.items()}

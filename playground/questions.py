"""Data files in LLaVA's formats: images, training conversations and question files with labels.

Training data is a JSON list of rows with `id`, `image`, `task` and `conversations`; text-only rows have no `image`. A
question file is JSON lines with `question_id`, `image`, `text`, `category` (the task family) and `label`. No scene and
no text-only question of a question file occurs in training data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from playground.draw import draw_scene
from playground.families import (
    BASE_IMAGE,
    BASE_TEXT,
    NEW_IMAGE,
    NEW_TEXT,
    ImageFamily,
    TextFamily,
    caption,
)
from playground.recipe import Recipe
from playground.scenes import Scene, distinct_scenes

BASE_TRAIN = "base_train.json"
CAPTIONS = "captions.json"
NEW_TRAIN = "new_train.json"
BASE_QUESTIONS = "base_questions.jsonl"
NEW_QUESTIONS = "new_questions.jsonl"
IMAGES = "images"
SCENES = "scenes.json"

Row = dict[str, Any]

HELD_OUT_SHARE = 5
"""At most one in this many of the different questions of a text family is kept out of training for a question file."""

GIVE_UP = 10_000
"""Draws without a usable result after which a family is called impossible."""


class DataWriter:
    """Draws scenes and questions from one seed and writes the files of a playground.

    Args:
        folder: where the files go; it must exist.
        recipe: how many rows of what.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.recipe = recipe
        self.random = Random(f"{recipe.seed}/data")
        self.scenes = distinct_scenes(self.random)
        self.reserved: set[str] = set()
        self.scene_of: dict[str, Scene] = {}

    def write(self) -> None:
        """Write everything. Question files come first, so that training data can leave out their text questions."""
        self._question_file(BASE_QUESTIONS, "eval-base", BASE_IMAGE, BASE_TEXT)
        self._question_file(NEW_QUESTIONS, "eval-new", NEW_IMAGE, NEW_TEXT)
        self._training_file(BASE_TRAIN, "base", self.recipe.base_rows, BASE_IMAGE, BASE_TEXT)
        self._training_file(NEW_TRAIN, "new", self.recipe.new_rows, NEW_IMAGE, NEW_TEXT)
        self._caption_file()
        cells = {
            name: [None if thing is None else [thing.colour, thing.kind] for thing in scene.cells]
            for name, scene in self.scene_of.items()
        }
        (self.folder / SCENES).write_text(json.dumps(cells) + "\n")

    def _image(self, scene: Scene, name: str) -> str:
        path = self.folder / IMAGES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_scene(scene, self.random).save(path)
        self.scene_of[name] = scene
        return name

    def _question_file(self, file: str, prefix: str, image: Sequence[ImageFamily], text: Sequence[TextFamily]) -> None:
        rows: list[Row] = []
        for family in image:
            for _ in range(self.recipe.questions_per_family):
                scene, (question, answer) = self._scene_for(family)
                name = self._image(scene, f"{prefix}/{len(rows):05d}.png")
                rows.append({"image": name, "text": question, "category": family.name, "label": answer})
        for text_family in text:
            for question, answer in self._held_out(text_family):
                rows.append({"text": question, "category": text_family.name, "label": answer})
        lines = [json.dumps({"question_id": index} | row) for index, row in enumerate(rows)]
        (self.folder / file).write_text("\n".join(lines) + "\n")

    def _scene_for(self, family: ImageFamily) -> tuple[Scene, tuple[str, str]]:
        for scene, _ in zip(self.scenes, range(GIVE_UP), strict=False):
            asked = family.ask(scene, self.random)
            if asked is not None:
                return scene, asked
        raise RuntimeError(f"task family '{family.name}': {GIVE_UP} scenes in a row suit none of its questions")

    def _held_out(self, family: TextFamily) -> Iterator[tuple[str, str]]:
        """Different questions of a text family, from now on reserved for the question file."""
        wanted = min(self.recipe.questions_per_family, family.distinct // HELD_OUT_SHARE)
        found = 0
        for _ in range(GIVE_UP):
            if found == wanted:
                return
            question, answer = family.ask(self.random)
            if question not in self.reserved:
                self.reserved.add(question)
                found += 1
                yield question, answer
        raise RuntimeError(f"task family '{family.name}': only {found} different questions in {GIVE_UP} draws")

    def _training_file(
        self, file: str, prefix: str, count: int, image: Sequence[ImageFamily], text: Sequence[TextFamily]
    ) -> None:
        rows: list[Row] = []
        for index in range(count):
            row: Row = {"id": f"{prefix}-{index:05d}"}
            if self.random.random() < self.recipe.text_share:
                turns = [self._text_turn(text) for _ in range(self.recipe.turns)]
            else:
                scene, turns = self._image_turns(image)
                row["image"] = self._image(scene, f"{prefix}/{index:05d}.png")
            rows.append(row | {"task": _tasks(turns), "conversations": _conversation(turns, "image" in row)})
        self._write_json(file, rows)

    def _text_turn(self, families: Sequence[TextFamily]) -> tuple[str, str, str]:
        for _ in range(GIVE_UP):
            family = self.random.choice(families)
            question, answer = family.ask(self.random)
            if question not in self.reserved:
                return family.name, question, answer
        raise RuntimeError("the question files have taken all text questions; lower Recipe.questions_per_family")

    def _image_turns(self, families: Sequence[ImageFamily]) -> tuple[Scene, list[tuple[str, str, str]]]:
        """A scene and questions about it, none twice in the same words and as many families as possible."""
        for scene in self.scenes:
            turns: dict[str, tuple[str, str, str]] = {}
            for attempt in range(8 * self.recipe.turns):
                if attempt % len(families) == 0:
                    order = self.random.sample(families, len(families))
                family = order[attempt % len(families)]
                asked = family.ask(scene, self.random)
                if asked is not None:
                    turns.setdefault(asked[0], (family.name, *asked))
                if len(turns) == self.recipe.turns:
                    return scene, list(turns.values())
        raise AssertionError("unreachable: the stream of scenes is endless")

    def _caption_file(self) -> None:
        """Images with their captions, in the form of LLaVA's stage 1: no question, the marker alone."""
        rows = []
        for index in range(self.recipe.caption_rows):
            scene = next(self.scenes)
            turns = [
                {"from": "human", "value": DEFAULT_IMAGE_TOKEN},
                {"from": "gpt", "value": caption(scene, self.random)},
            ]
            name = self._image(scene, f"captions/{index:05d}.png")
            rows.append({"id": f"caption-{index:05d}", "image": name, "task": "caption", "conversations": turns})
        self._write_json(CAPTIONS, rows)

    def _write_json(self, file: str, rows: Sequence[Row]) -> None:
        (self.folder / file).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _tasks(turns: Sequence[tuple[str, str, str]]) -> str:
    """The task families of a row, sorted and separated by commas."""
    return ",".join(sorted({family for family, _, _ in turns}))


def _conversation(turns: Sequence[tuple[str, str, str]], has_image: bool) -> list[dict[str, str]]:
    """Human and model turns in LLaVA's form, the image marker in the first one."""
    conversation = []
    for index, (_, question, answer) in enumerate(turns):
        marker = f"{DEFAULT_IMAGE_TOKEN}\n" if has_image and index == 0 else ""
        conversation.append({"from": "human", "value": marker + question})
        conversation.append({"from": "gpt", "value": answer})
    return conversation

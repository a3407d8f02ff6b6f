"""The generated data: repeatable, rightly labelled, split without overlap, in the formats that training reads."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.dataset import LazySupervisedDataset
from llava.eval.answering.questions import read_questions
from llava.runtime.tokenizer import load_tokenizer
from playground.draw import IMAGE_SIZE
from playground.families import BASE_FAMILIES, NEW_FAMILIES
from playground.questions import (
    BASE_QUESTIONS,
    BASE_TRAIN,
    CAPTIONS,
    IMAGES,
    NEW_QUESTIONS,
    NEW_TRAIN,
    SCENES,
    DataWriter,
)
from playground.recipe import Recipe
from playground.scenes import COLOURS, DIGITS, PLACES, SHAPES
from playground.tiny import TinyFolders
from tests.playground.answers import GRID, Cells, right_answer

TRAIN_FILES = {BASE_TRAIN: BASE_FAMILIES, NEW_TRAIN: NEW_FAMILIES}
QUESTION_FILES = {BASE_QUESTIONS: BASE_FAMILIES, NEW_QUESTIONS: NEW_FAMILIES}


def write(folder: Path, seed: int) -> Path:
    folder.mkdir()
    recipe = Recipe(seed=seed, caption_rows=40, base_rows=60, new_rows=60, questions_per_family=15)
    DataWriter(folder, recipe).write()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "seed0", 0)


@pytest.fixture(scope="module")
def scenes(data: Path) -> dict[str, Cells]:
    return json.loads((data / SCENES).read_text())


def rows_of(data: Path, file: str) -> list[dict[str, Any]]:
    return json.loads((data / file).read_text())


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    values = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    return list(zip(values[0::2], values[1::2], strict=True))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_other_seed_other_bytes(data: Path, tmp_path: Path) -> None:
    first, again, other = digests(data), digests(write(tmp_path / "again", 0)), digests(write(tmp_path / "other", 1))
    assert len(first) > 200
    assert first == again
    for file in (*TRAIN_FILES, *QUESTION_FILES, CAPTIONS, SCENES):
        assert first[file] != other[file]
    shared = first.keys() & other.keys()
    same_images = sum(first[name] == other[name] for name in shared if name.endswith(".png"))
    assert same_images == 0


@pytest.mark.parametrize("file", TRAIN_FILES)
def test_training_answers_are_right(data: Path, scenes: dict[str, Cells], file: str) -> None:
    checked = 0
    for row in rows_of(data, file):
        cells = scenes[row["image"]] if "image" in row else None
        for question, answer in turns_of(row):
            assert answer == right_answer(question, cells), (row["id"], question)
            checked += 1
    assert checked > 300


@pytest.mark.parametrize("file", QUESTION_FILES)
def test_question_labels_are_right(data: Path, scenes: dict[str, Cells], file: str) -> None:
    for question in read_questions(data / file):
        cells = scenes[question.images[0]] if question.images else None
        assert question.label == right_answer(question.text, cells), question


def test_captions_name_what_is_there(data: Path, scenes: dict[str, Cells]) -> None:
    complete = 0
    for row in rows_of(data, CAPTIONS):
        ((prompt, text),) = turns_of(row)
        assert prompt == "<image>"
        cells = scenes[row["image"]]
        present = [{GRID[index], *cell} for index, cell in enumerate(cells) if cell is not None]
        named = [set(part.split()) for part in text.split(", ")]
        assert all(part in present for part in named), (text, cells)
        complete += len(named) == len(present)
    assert complete > 20  # those that name by kind leave out kinds that occur twice


def test_an_answer_to_another_image_is_noticed(data: Path, scenes: dict[str, Cells]) -> None:
    """Without this, the tests of labels could pass because the answers do not depend on the image."""
    questions = [q for q in read_questions(data / BASE_QUESTIONS) if q.category == "count"]
    answers = [right_answer(question.text, scenes[question.images[0]]) for question in questions]
    assert len(set(answers)) > 1


def test_families_of_base_and_fine_tuning_are_disjoint(data: Path) -> None:
    assert not set(BASE_FAMILIES) & set(NEW_FAMILIES)
    for file, families in TRAIN_FILES.items():
        tasks = {task for row in rows_of(data, file) for task in row["task"].split(",")}
        assert tasks == set(families)
    for file, families in QUESTION_FILES.items():
        assert {question.category for question in read_questions(data / file)} == set(families)


def test_base_never_sees_the_wording_of_the_new_families(data: Path) -> None:
    names = re.compile(rf"\b({'|'.join((*PLACES, *COLOURS, *SHAPES, *DIGITS))})\b")

    def forms(file: str) -> set[str]:
        """Questions with everything that varies inside a family taken out."""
        return {names.sub("_", question) for row in rows_of(data, file) for question, _ in turns_of(row)}

    assert len(forms(BASE_TRAIN)) == len(BASE_FAMILIES)
    assert len(forms(NEW_TRAIN)) == len(NEW_FAMILIES)
    assert not forms(BASE_TRAIN) & forms(NEW_TRAIN)


def test_no_scene_and_no_text_question_is_both_trained_on_and_asked(data: Path, scenes: dict[str, Cells]) -> None:
    all_rows = [row for file in (*TRAIN_FILES, CAPTIONS) for row in rows_of(data, file)]
    questions = [question for file in QUESTION_FILES for question in read_questions(data / file)]
    trained = {json.dumps(scenes[row["image"]]) for row in all_rows if "image" in row}
    asked = {json.dumps(scenes[question.images[0]]) for question in questions if question.images}
    assert len(trained) > 100
    assert len(asked) > 100
    assert not trained & asked
    trained_texts = {text for row in all_rows if "image" not in row for text, _ in turns_of(row)}
    asked_texts = {question.text for question in questions if not question.images}
    assert trained_texts
    assert asked_texts
    assert not trained_texts & asked_texts


@pytest.mark.parametrize("file", QUESTION_FILES)
def test_no_family_can_be_answered_by_one_word(data: Path, file: str) -> None:
    labels: dict[str, list[str]] = {}
    for question in read_questions(data / file):
        labels.setdefault(question.category, []).append(question.label or "")
    for family, values in labels.items():
        most = max(values.count(value) for value in values) / len(values)
        assert most <= 0.75, f"{family}: one word is right {100 * most:.0f} % of the time"


@pytest.mark.parametrize(
    ("file", "template"), [(BASE_TRAIN, "v1"), (NEW_TRAIN, "v1"), (CAPTIONS, "plain")], ids=["base", "new", "captions"]
)
def test_every_row_can_be_trained_on(data: Path, tiny_folders: TinyFolders, file: str, template: str) -> None:
    dataset = LazySupervisedDataset(
        data / file,
        load_tokenizer(tiny_folders.language_model),
        CLIPImageProcessorPil.from_pretrained(tiny_folders.tower),
        template=conv_templates[template],
        image_folder=data / IMAGES,
        image_aspect_ratio="square",
        is_multimodal=True,
        mm_use_im_start_end=False,
        model_max_length=512,
    )
    rows = rows_of(data, file)
    for row, item in zip(rows, (dataset[index] for index in range(len(dataset))), strict=True):
        assert item["image"].shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        assert int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == int("image" in row)
        targets = item["labels"][item["labels"] >= 0]
        text = dataset.tokenizer.decode(targets, skip_special_tokens=True)
        for _, answer in turns_of(row):
            assert answer in text
        # No byte tokens (3 to 258) except the newline that ends a caption: the tokenizer knows every word.
        byte_tokens = targets[(targets > 2) & (targets < 259)]
        assert torch.equal(byte_tokens, torch.full_like(byte_tokens, 13))

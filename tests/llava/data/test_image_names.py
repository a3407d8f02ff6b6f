"""A row's images and their marks agree, or the row is named: in training, when rows are skipped, and in evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.image_names import READ_KEYS, UNREAD_KEYS, image_names, is_mark
from llava.data.skipped import read_skipped
from llava.errors import BadSampleError, ImageCountError, ImageCutError
from llava.eval.answering.questions import read_questions
from llava.eval.model_vqa_science import read_tasks
from llava.eval.scoring.references import read_conversations
from llava.train.train import main as train
from tests.golden import golden_dir
from tests.llava.data.test_dataset import GOOD_IMAGE, make_dataset, write_rows
from tests.llava.train.test_training import command_line

WORDS = "word " * 60


def row(*texts: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "r", "conversations": turns} | more


ASKED = ("<image>\nWhich color?", "Red.")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, []),
        ({"image": "a.png"}, ["a.png"]),
        ({"images": "a.png"}, ["a.png"]),
        ({"images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"image": "a.png", "images": ["a.png"]}, ["a.png"]),
        ({"image": None, "images": ["a.png"]}, ["a.png"]),
        ({"image": [], "images": []}, []),
        ({"image": "a.png", "image_path": "/data/a.png", "video": "a.mp4"}, ["a.png"]),  # where the image is from
        ({"image_path": "", "video": None, "img": []}, []),
    ],
)
def test_what_a_row_names(keys: dict[str, Any], names: list[str]) -> None:
    assert image_names(keys) == names


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"images": [{"path": "a.png"}]}, "'images' must be a file name or a list of file names"),
        ({"image": "a.png", "images": ["b.png"]}, r"'image' is 'a\.png', but 'images' is \['b\.png'\]"),
        ({"image": 3}, "'image' must be a file name"),
        *(({key: "a.x"}, f"'a.x' under '{key}', which is not read") for key in UNREAD_KEYS),
        ({"image": [], "videos": ["a.mp4"]}, "a video cannot be used; the keys that are read are image and images"),
    ],
)
def test_what_a_row_may_not_name(keys: dict[str, Any], message: str) -> None:
    assert not set(UNREAD_KEYS) & set(READ_KEYS)
    with pytest.raises(BadSampleError, match=message):
        image_names(keys)


BAD_ROWS = {
    "another key": (row(*ASKED, image_path="im0.png"), BadSampleError, "names 'im0.png' under 'image_path'"),
    "a video": (row(*ASKED, video="im0.mp4"), BadSampleError, "under 'video', which is not read"),
    "another key without a mark": (row("What?", "A.", img="im0.png"), BadSampleError, "under 'img'"),
    "a mark in front": (row(*ASKED), ImageCountError, r"1 <image> in turn 0 but 0 image\(s\)"),
    "a mark behind": (row("Hi", "Hello", "Which?\n<image>", "Red."), ImageCountError, r"1 <image> in turn 2 but 0"),
    "no mark": (row("What?", "A.", image="im0.png"), ImageCountError, r"0 <image> in the text but 1 image\(s\)"),
    "no mark for two": (row("What?", "A.", images=["im0.png"] * 2), ImageCountError, r"0 <image> .* 2 image\(s\)"),
    "one mark for two": (row(*ASKED, images=["im0.png"] * 2), ImageCountError, r"1 <image> .* 2 image\(s\)"),
    "the second image cut off": (
        row("<image> One?", "Yes.", f"{WORDS}<image> Two?", "No.", image=["im0.png"] * 2),
        ImageCutError,
        r"image 2 of 2 begins at position \d+, but a sample is cut at 64 \(--model_max_length\)",
    ),
    "a later image cut off": (
        row("Hi", "Hello.", WORDS, "Yes.", "<image> Which?", "Red.", image="im0.png"),
        ImageCutError,
        "image 1 of 1 begins at position",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_would_be_trained_on_blind_is_named(name: str, tmp_path: Path) -> None:
    bad, kind, message = BAD_ROWS[name]
    path = write_rows(tmp_path / "data.jsonl", [GOOD_IMAGE, bad])
    with pytest.raises(kind, match=rf"data\.jsonl, row 1 \(id 'r'\): .*{message}"):
        make_dataset(path, model_max_length=64)[1]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_it_is_skipped_and_listed(name: str, tmp_path: Path) -> None:
    """Where every other row has an image, too: a row that seems to be text, of which there is none, is replaced."""
    path = write_rows(tmp_path / "data.jsonl", [GOOD_IMAGE, BAD_ROWS[name][0], GOOD_IMAGE])
    options = {"on_bad_sample": "skip", "skipped_file": tmp_path / "skipped.jsonl", "model_max_length": 64}
    dataset = make_dataset(path, **options)
    assert torch.equal(dataset[1]["input_ids"], dataset[2]["input_ids"])
    (entry,) = read_skipped(tmp_path / "skipped.jsonl")
    assert (entry["row"], entry["id"]) == (1, "r")


def test_an_image_that_fits_is_not_cut_off(tmp_path: Path) -> None:
    """The same rows, whole; and an image of which a part is cut off, as in the original."""
    rows = [BAD_ROWS["the second image cut off"][0], BAD_ROWS["a later image cut off"][0]]
    dataset = make_dataset(write_rows(tmp_path / "data.jsonl", rows), model_max_length=512)
    assert [dataset[index]["input_ids"].tolist().count(IMAGE_TOKEN_INDEX) for index in range(2)] == [2, 1]


def test_the_key_of_other_programs_gives_the_same_item(tmp_path: Path) -> None:
    named = {key: value for key, value in GOOD_IMAGE.items() if key != "image"}
    rows = [GOOD_IMAGE, named | {"images": [GOOD_IMAGE["image"]]}]
    dataset = make_dataset(write_rows(tmp_path / "data.jsonl", rows))
    assert torch.equal(dataset[0]["image"], dataset[1]["image"])
    assert torch.equal(dataset[0]["input_ids"], dataset[1]["input_ids"])
    assert dataset.modality_lengths[0] == dataset.modality_lengths[1] > 0


@pytest.mark.parametrize("text", ["Where does <image> belong in RSS?", "Write <image>\nthen its url", "a\n<image>\nb"])
def test_the_word_within_a_text_stays_a_word(text: str, tmp_path: Path) -> None:
    """As in the original, whose data have rows of text about everything."""
    dataset = make_dataset(write_rows(tmp_path / "data.jsonl", [row(text, "So: <image>")]))
    assert not is_mark(text)
    assert IMAGE_TOKEN_INDEX not in dataset[0]["input_ids"]


@pytest.mark.parametrize("key", ["image_path", "video"])
def test_a_run_stops_before_its_first_update(key: str, tmp_path: Path) -> None:
    image = golden_dir("llava") / "data" / "images"
    path = tmp_path / "data.json"
    path.write_text(json.dumps([row(*ASKED, **{key: "im0.png"})] * 4))
    out = tmp_path / "out"
    with pytest.raises(BadSampleError, match=rf"data\.json, row \d.*under '{key}'"):
        train(command_line(out, data_path=path, image_folder=image, max_steps=1))
    assert not list(out.glob("**/*.safetensors"))


# Evaluation


@pytest.mark.parametrize("key", ["image", "images", "image_path", "video"])
def test_questions_are_not_asked_blind(key: str, tmp_path: Path) -> None:
    """The three kinds of question files: JSON lines, conversations to be asked, conversations with references."""
    value = ["im0.png"] if key == "images" else "im0.png"
    lines, turns = tmp_path / "questions.jsonl", tmp_path / "turns.json"
    lines.write_text(json.dumps({"question_id": 1, "text": "What?", key: value}) + "\n")
    turns.write_text(json.dumps([row(*ASKED, **{key: value})]))
    readers = {read_questions: lines, read_tasks: turns, read_conversations: turns}
    for read, path in readers.items():
        if key in READ_KEYS:
            assert read(path)[0].images == ("im0.png",)
        else:
            with pytest.raises(BadSampleError, match=rf"{path.name}:.*under '{key}', which is not read"):
                read(path)

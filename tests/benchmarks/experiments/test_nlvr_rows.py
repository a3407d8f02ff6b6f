"""Merging questions into conversations, and the baselines: on made-up rows, and on the data in LLAVA_NLVR_DIR."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.experiments.common.rows import (
    Asked,
    blind_accuracy,
    conversation_rows,
    majority_accuracy,
    questions_by_scene,
    read_questions,
    read_train,
)
from llava.errors import BadSampleError

ASKED = [
    Asked("images/s-1-0.png", "count", "How many black?", "2"),
    Asked("images/s-1-1.png", "count", "How many blue?", "0"),
    Asked("images/s-1-1.png", "exist", "Is there a blue square?", "No"),
    Asked("images/s-2-0.png", "count", "How many black?", "5"),
    Asked("images/s-2-0.png", "verify", "All are black.", "True"),
]


def turns(row: dict) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in row["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def test_questions_of_a_scene_are_asked_of_all_its_images() -> None:
    rows = conversation_rows(ASKED, {"count": 3}, 3, seed=0)
    asked = {row["image"]: sorted(question.removeprefix("<image>\n") for question, _ in turns(row)) for row in rows}
    assert asked == {
        "images/s-1-0.png": ["How many black?", "How many blue?"],
        "images/s-1-1.png": ["How many black?", "How many blue?"],
        "images/s-2-0.png": ["How many black?"],
    }


def test_answers_belong_to_the_image() -> None:
    known = {("1", "How many black?"): "2", ("1", "How many blue?"): "0", ("2", "How many black?"): "5"}
    for row in conversation_rows(ASKED, {"count": 3}, 30, seed=0):
        for question, answer in turns(row):
            assert known[row["image"].split("-")[1], question.removeprefix("<image>\n")] == answer


def test_only_the_first_turn_has_the_image() -> None:
    for row in conversation_rows(ASKED, {"count": 3, "exist": 1}, 10, seed=0):
        assert [value.count("<image>") for value, _ in turns(row)] == [1] + [0] * (len(turns(row)) - 1)
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * len(turns(row))


def test_rows_depend_on_the_seed_alone() -> None:
    first, again, other = (conversation_rows(ASKED, {"count": 1}, 40, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_every_image_comes_equally_often() -> None:
    counts = Counter(row["image"] for row in conversation_rows(ASKED, {"count": 1}, 31, seed=3))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_turn_limits_and_order() -> None:
    rows = conversation_rows(ASKED, {"count": 1, "exist": 1}, 60, seed=0)
    first_is_exist = {"Is there" in turns(row)[0][0] for row in rows if len(turns(row)) == 2}
    assert first_is_exist == {True, False}
    assert max(len(turns(row)) for row in rows) == 2


def test_contradicting_box_orders_are_refused() -> None:
    with pytest.raises(BadSampleError, match="another box order"):
        questions_by_scene([*ASKED, Asked("images/s-1-5.png", "count", "How many black?", "3")])


def test_a_scene_without_questions_is_refused() -> None:
    with pytest.raises(BadSampleError, match="no question of"):
        conversation_rows(ASKED, {"most": 1}, 3, seed=0)


def test_two_turns_in_the_source_are_refused(tmp_path: Path) -> None:
    row = {"id": "a", "image": "x-0.png", "task": "count", "conversations": [{"from": "human", "value": "<image>\nq"}]}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    with pytest.raises(BadSampleError, match="row a"):
        read_train(tmp_path / "train.json")


def test_baselines() -> None:
    train = [Asked("t-0.png", "count", "black?", answer) for answer in ("1", "2", "2")]
    train += [Asked("t-0.png", "count", "blue?", answer) for answer in ("3", "3", "3")]
    questions = [
        Asked("v-0.png", "count", "black?", "2"),
        Asked("v-0.png", "count", "black?", "1"),
        Asked("v-0.png", "count", "blue?", "2"),
        Asked("v-0.png", "count", "never asked?", "3"),
    ]
    assert majority_accuracy(questions) == {"count": 2 / 4}
    assert blind_accuracy(train, questions) == {"count": 2 / 4}  # 2 for black, 3 for blue, 3 for the unknown question


def test_real_data(nlvr_dir: Path) -> None:
    """Box orders agree, and the baselines are those that the data's own description states."""
    train, questions = read_train(nlvr_dir / "train.json"), read_questions(nlvr_dir / "val.jsonl")
    assert len(questions_by_scene(train)) == 989
    majority = {task: round(100 * share, 1) for task, share in majority_accuracy(questions).items()}
    assert majority == {"verify": 55.4, "exist": 55.0, "most": 37.3, "count": 24.3}
    blind = {task: round(100 * share, 1) for task, share in blind_accuracy(train, questions).items()}
    assert blind == {"verify": 54.9, "exist": 79.5, "most": 30.7, "count": 24.5}

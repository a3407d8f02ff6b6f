"""Perplexity and METEOR of long answers: values against one pass over the whole text, turns, continuation, errors."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llava.data.images import load_image
from llava.errors import BadSampleError, FlagError
from llava.eval import long_answers
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.runner import image_arguments, load_images, make_prompt
from llava.eval.scoring import meteor
from llava.eval.scoring.references import _conversation, read_conversations
from tests.golden import golden_dir

CONVERSATIONS: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "im0.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is shown?"},
            {"from": "gpt", "value": "A red lake."},
            {"from": "human", "value": "And beside it?"},
            {"from": "gpt", "value": "Two dogs and a sign."},
        ],
    },
    {
        "id": "b",
        "conversations": [{"from": "human", "value": "What is a lake?"}, {"from": "gpt", "value": "Water."}],
    },
]
PROGRAMS = {
    "model_lvis_for_ppl": ("ppl", False),
    "model_lvis_multi_round_for_ppl": ("ppl", True),
    "model_lvis_for_meteor": ("meteor", False),
    "model_lvis_multi_round_for_meteor": ("meteor", True),
}


class NoSynonyms:
    """A WordNet without any entry: METEOR by equal words and stems."""

    def synsets(self, word: str) -> list[Any]:
        return []


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(CONVERSATIONS), encoding="utf-8")
    return path


@pytest.fixture
def run(
    tmp_path: Path, conversations: Path, checkpoint: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Runs a program and gives the rows that it wrote."""
    monkeypatch.setattr(long_answers, "find_wordnet", NoSynonyms)

    def call(name: str, *more: str) -> list[dict[str, Any]]:
        program = importlib.import_module(f"llava.dynamic_eval.{name}")
        arguments = f"--model-path {checkpoint} --question-file {conversations} --image-folder {image_folder}"
        arguments += f" --answers-file {tmp_path / name}.jsonl --conv-mode vicuna_v1 --device cpu"
        path = program.main([*arguments.split(), *more])
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return call


def perplexity_in_one_pass(loaded: LoadedModel, image_folder: Path, row: int, turn: int) -> float:
    """Of the reference of a turn, by a single forward pass over everything up to its end."""
    conversation = _conversation(CONVERSATIONS[row], row, f"row {row}")
    task = long_answers._task(conversation)
    images = load_images(task, loaded, lambda name, where: load_image(str(image_folder), name, row=where))
    tokenizer = loaded.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = make_prompt("", task, loaded, "vicuna_v1").input_ids.tolist()
    for index in range(turn):
        # The end of an earlier answer was scored and not fed.
        ids += encode(conversation.turns[index].reference + tokenizer.eos_token)[:-1]
        ids += encode(f"USER:{conversation.turns[index + 1].question}ASSISTANT:")
    answer = encode(conversation.turns[turn].reference + tokenizer.eos_token)
    arguments = image_arguments([images], loaded) if images else {}
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids + answer]), **arguments).logits[0, -len(answer) - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(answer)).exp())


def test_perplexity_step_by_step_is_that_of_one_pass(
    run: Callable[..., list[dict[str, Any]]], loaded: LoadedModel, image_folder: Path
) -> None:
    rows = run("model_lvis_for_ppl")
    assert [row["question_id"] for row in rows] == ["a", "b"]
    for index, row in enumerate(rows):
        (turn,) = row["turns"]
        expected = perplexity_in_one_pass(loaded, image_folder, index, 0)
        # fp32 rounding of an exponential of values around 100: below 2e-6 relative where measured.
        assert turn["ppl"] == pytest.approx(expected, rel=1e-5)
        assert math.isfinite(turn["ppl"])
        assert turn["stored"] == turn["tokens"] - 1  # a dense model stores whatever is fed


def test_later_turns_continue_the_cache(
    run: Callable[..., list[dict[str, Any]]], loaded: LoadedModel, image_folder: Path
) -> None:
    first, all_turns = run("model_lvis_for_ppl"), run("model_lvis_multi_round_for_ppl")
    assert [len(row["turns"]) for row in all_turns] == [2, 1]
    assert [row["turns"][0]["ppl"] for row in all_turns] == [row["turns"][0]["ppl"] for row in first]
    assert all_turns[0]["turns"][1]["ppl"] == pytest.approx(
        perplexity_in_one_pass(loaded, image_folder, 0, 1), rel=1e-5
    )


@pytest.mark.parametrize("name", ["model_lvis_for_meteor", "model_lvis_multi_round_for_meteor"])
def test_meteor_programs_write_answers_and_scores(
    run: Callable[..., list[dict[str, Any]]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(name, "--max-new-tokens", "4")
    for row in rows:
        for turn in row["turns"]:
            assert 0 <= turn["meteor"] <= 1
            assert turn["tokens"] <= 4
    assert "mean meteor" in capsys.readouterr().out


def test_an_interrupted_run_is_continued(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("model_lvis_for_ppl")
    path = tmp_path / "model_lvis_for_ppl.jsonl"
    path.write_text(path.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    measured: list[str] = []
    measure = long_answers.measure_conversation

    def noted(conversation: Any, *args: Any) -> dict[str, Any]:
        measured.append(conversation.question_id)
        return measure(conversation, *args)

    monkeypatch.setattr(long_answers, "measure_conversation", noted)
    assert run("model_lvis_for_ppl") == whole
    assert measured == ["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "at least one conversation"),
        ('[{"id": 1}]', "row 0: expected an object with a list 'conversations'"),
        ('[{"conversations": [{"from": "gpt", "value": "x"}]}]', "must alternate human, gpt"),
        ('[{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}]', "has no text"),
        (
            '[{"image": 3, "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]',
            "'image'",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadSampleError, match=message):
        read_conversations(path)


def test_meteor_counts_equal_words_and_their_order() -> None:
    wordnet = NoSynonyms()
    assert meteor.meteor("The red lake.", "the red lake .", wordnet) > 0.99
    assert meteor.meteor("The red lake.", "lake red the .", wordnet) < 0.9
    assert meteor.meteor("The red lake.", "nothing", wordnet) == 0


def test_without_wordnet_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(FlagError, match=r"nltk\.downloader wordnet"):
        meteor.find_wordnet()


@pytest.mark.parametrize("name", PROGRAMS)
def test_options_are_the_originals(name: str) -> None:
    table = json.loads((golden_dir("dynamic") / "table_eval_options.json").read_text(encoding="utf-8"))
    parser: argparse.ArgumentParser = importlib.import_module(f"llava.dynamic_eval.{name}").build_parser()
    ours = {flag: action for action in parser._actions for flag in action.option_strings}
    for option in table[f"llava/dynamic_eval/{name}.py"]:
        action = ours[option["flag"]]
        if option.get("action") == "store_true":
            assert action.default is False
        else:
            assert action.default == option["default"]

"""What a publication says of a run: no path of the machine that trained, and the scores of the weights that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.runtime.publishing.access import Destination
from llava.runtime.publishing.card import Kind, write_card
from llava.runtime.publishing.staging import published_record

PRINTS = {"data_path": "0123@0.5 owner/set:4567@2 89ab", "model_name_or_path": "cdef"}

CUT: dict[str, tuple[str, Any, Any]] = {
    "an absolute folder": ("image_folder", "/data/me/images", "images"),
    "a relative folder": ("image_folder", "private/images", "images"),
    "a list with weights": (
        "data_path",
        ["private/a.json@0.5", "owner/set@2", "private/mine"],
        ["a.json@0.5", "owner/set@2", "mine"],
    ),
    "a local base that looks like an id": ("model_name_or_path", "private/base", "base"),
    "a tower of the hub": ("vision_tower", "openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
    "weights of open_clip": ("vision_tower", "open_clip:ViT-L-14//data/me/w.pt", "open_clip:ViT-L-14/w.pt"),
    "a tag of open_clip": ("vision_tower", "open_clip:ViT-L-14/openai", "open_clip:ViT-L-14/openai"),
    "a word and a path": ("lora_nums", "auto:/data/me/x.json", "auto:x.json"),
    "an address": ("dist_url", "env://", "env://"),
    "a benchmark": ("eval_questions", ["textvqa", "private/q.jsonl"], ["textvqa", "q.jsonl"]),
    "the output folder": ("output_dir", "private/out", "out"),
    "a number": ("learning_rate", 1e-4, 1e-4),
    "a template": ("chat_template", "{% for m in messages %}a/b{% endfor %}", "{% for m in messages %}a/b{% endfor %}"),
}


@pytest.mark.parametrize("case", CUT)
def test_options_that_are_paths_are_cut(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any folder: none of these paths exists where the run is published."""
    monkeypatch.chdir(tmp_path)
    option, value, expected = CUT[case]
    record = {"arguments": {"data": {option: value}, "options": {"x": {option: value}}}, "fingerprints": PRINTS}
    found = published_record({**record, "resumes": [record]})
    assert found["arguments"] == {"data": {option: expected}, "options": {"x": {option: expected}}}
    assert found["resumes"][0]["arguments"] == found["arguments"]
    assert found["fingerprints"] == PRINTS


def test_how_a_run_was_resumed_is_not_published() -> None:
    part = {"arguments": {}, "changed": ["--image_folder: '/data/me/a' then, '/data/me/b' now"], "resumed_from": "c"}
    assert published_record({**part, "resumes": [part]}) == {"arguments": {}, "resumes": [{"arguments": {}}]}


STATE = {
    "global_step": 4,
    "best_global_step": 2,
    "log_history": [
        {"step": 2, "eval_loss": 1.25, "eval_image_loss": 1.5},
        {"step": 4, "eval_loss": 2.5, "eval_text_loss": 3.5},
    ],
}

WEIGHTS = {
    "the best are loaded": ("out", True, {"loss": "1.25", "image_loss": "1.5"}),
    "the last": ("out", False, {"loss": "2.5", "image_loss": "1.5", "text_loss": "3.5"}),
    "a checkpoint": ("checkpoint-4", True, {"loss": "2.5", "image_loss": "1.5", "text_loss": "3.5"}),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_card_has_the_scores_of_the_published_weights(case: str, tmp_path: Path) -> None:
    name, loads_best, expected = WEIGHTS[case]
    folder, staged = tmp_path / name, tmp_path / "staged"
    folder.mkdir()
    staged.mkdir()
    record = {"arguments": {"training": {"load_best_model_at_end": loads_best}}, "versions": {}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    text = write_card(folder, staged, Destination("me/x", license="mit"), Kind("text-generation", (), "m", "u")).text
    rows = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| evaluation of the run")]
    assert {metric: value.removesuffix(" |") for metric, value in rows} == expected
    assert ("weights of update 2" in text) == (case == "the best are loaded")

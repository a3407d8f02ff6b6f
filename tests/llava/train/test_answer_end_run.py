"""A trained model ends its answers: what a run says before it trains, and what its checkpoints carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import GenerationConfig

from llava.convert.hf import to_hf
from llava.eval.model_vqa_loader import main as answer
from llava.model.builder import load_pretrained_model
from llava.model.full_weights import write_full_weights
from llava.runtime.tokenizer import eos_ids
from llava.train.train import main
from tests.golden import golden_dir
from tests.llava.data.test_answer_end import END_OF_TEXT, IM_END, qwen
from tests.llava.data.test_chat_template import CHATML
from tests.llava.train.test_training import command_line
from tests.model.backbones import plain_model

LLAVA_BASE = golden_dir("llava") / "tiny-llava-v1.5"
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4},
    "projector": {"tune_mm_mlp_adapter": True},
}


def save_qwen(folder: Path, end: str) -> Path:
    """A Qwen2 as on a model hub, whose only token that ends generation is `end`."""
    tokenizer, model = qwen(CHATML, end), plain_model("qwen2")
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_carry_the_end_of_the_template(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every kind of checkpoint, also where the weights and their generation_config are those of the base."""
    base, out = save_qwen(tmp_path / "base", END_OF_TEXT), tmp_path / "out"
    options = {"model_name_or_path": base, "version": "tokenizer", "max_steps": 1, "save_steps": 1}
    main(command_line(out, **options, **RECIPES[recipe]))
    ends = qwen().convert_tokens_to_ids([END_OF_TEXT, IM_END])
    assert f"answer end  '{IM_END}', token {ends[1]}, added to those of generation_config" in capsys.readouterr().out
    for folder in (out, out / "checkpoint-1"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == ends
        _, model, _, _ = load_pretrained_model(str(folder), None if recipe == "full" else str(base), device="cpu")
        assert model.generation_config.eos_token_id == ends
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == ends[0]
    # A folder of an earlier version says its template in `run.json` or `config.json`, and no end.
    saved = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps(saved | {"eos_token_id": ends[0]}))
    _, model, _, _ = load_pretrained_model(str(out), None if recipe == "full" else str(base), device="cpu")
    assert model.generation_config.eos_token_id == ends
    if recipe == "full":
        to_hf(out, tmp_path / "hf", conv_mode="chatml_direct")
        assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == ends
    if recipe == "lora":
        write_full_weights(out, tmp_path / "merged", str(base))
        assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == ends


def test_an_end_that_generation_config_names_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command_line(tmp_path / "out", max_steps=1))
    assert "answer end  '</s>', token 2\n" in capsys.readouterr().out
    saved, original = (eos_ids(GenerationConfig.from_pretrained(folder)) for folder in (tmp_path / "out", LLAVA_BASE))
    assert saved == original == [2]


@pytest.mark.parametrize(("end", "version", "warns"), [(IM_END, "v1", True), (END_OF_TEXT, "tokenizer", False)])
def test_a_trained_model_stops(
    end: str, version: str, warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the end is four ordinary tokens, which the run says before anything is trained."""
    Image.new("RGB", (28, 28), "red").save(tmp_path / "one.png")
    turns = [("human", "<image>\nWhat?"), ("gpt", "red ship"), ("human", "Sure?"), ("gpt", "yes it is")]
    talk = [{"from": speaker, "value": text} for speaker, text in turns]
    rows = [{"id": number, "image": "one.png", "conversations": talk} for number in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 0, "image": "one.png", "text": "What?"}))
    options = {"data_path": tmp_path / "data.json", "image_folder": tmp_path, "image_aspect_ratio": "square"}
    rate = {"max_steps": 40, "save_steps": 100, "lr_scheduler_type": "constant"}
    base = save_qwen(tmp_path / "base", end)
    main(command_line(tmp_path / "out", model_name_or_path=base, version=version, **options, **rate))
    out = capsys.readouterr().out
    if warns:
        to_hf(tmp_path / "out", tmp_path / "hf", conv_mode="v1")
        assert (
            "answers of 'v1' end with '</s>', which is not a token: use it as a stop string" in capsys.readouterr().out
        )
    warning = "answer end  --version v1: an answer ends with '</s>', which is not one end token"
    assert (warning in out) == warns
    assert not warns or out.index(warning) < out.index("base  ") < out.index("training  ")
    words = {
        "model-path": tmp_path / "out", "question-file": tmp_path / "q.jsonl", "image-folder": tmp_path,
        "answers-file": tmp_path / "a.jsonl", "temperature": 0, "max_new_tokens": 24, "conv-mode": version,
    }  # fmt: skip
    answer([str(word) for name, value in words.items() for word in (f"--{name}", value)])
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"] == "red ship"

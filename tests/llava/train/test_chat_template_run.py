"""`--version tokenizer`: from the chat template of the base through training to the prompt of an evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.constants import IGNORE_INDEX
from llava.errors import FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import load_model
from llava.eval.answering.runner import make_prompt
from llava.train.data_check import main as check
from llava.train.summary import next_command
from llava.train.train import build_run, main, parse_args
from tests.golden import golden_dir
from tests.llava.data.test_chat_template import WITH_BLANKS
from tests.llava.train.test_training import command_line, losses

LLAVA = golden_dir("llava")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The golden model with a chat template in its tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(LLAVA / "tiny-llava-v1.5", folder, copy_function=shutil.copyfile)
    (folder / "chat_template.jinja").write_text(WITH_BLANKS)
    return folder


@pytest.mark.parametrize("recipe", [{}, {"lora_enable": True, "lora_r": 4}], ids=["full", "lora"])
def test_training_and_evaluation_write_the_same_prompt(recipe: dict, base: Path, tmp_path: Path) -> None:
    options = command_line(tmp_path / "out", **recipe, model_name_or_path=base, version="tokenizer")
    dataset = build_run(parse_args(options)).dataset
    row = next(row for row in json.loads((LLAVA / "data" / "finetune.json").read_text()) if "image" in row)
    index = next(index for index in range(len(dataset)) if dataset.rows[index] == row)
    item = dataset[index]
    first = next(i for i, label in enumerate(item["labels"].tolist()) if label != IGNORE_INDEX)
    main(options)
    assert len(losses(tmp_path / "out")) == 3
    loaded = load_model(str(tmp_path / "out"), str(base), device="cpu")
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    prompt = make_prompt("0", Task(0, question, question, (row["image"],), "q:1"), loaded, "tokenizer")
    assert prompt.input_ids.tolist() == item["input_ids"][:first].tolist()


def test_a_base_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="--version tokenizer: this tokenizer has no chat template"):
        main(command_line(tmp_path, version="tokenizer"))


def test_the_check_uses_it_too(base: Path) -> None:
    options = ("--image_folder", LLAVA / "data" / "images", "--tokenizer", base, "--image_length", 4)
    words = [LLAVA / "data" / "finetune.json", *options, "--version", "tokenizer", "--num_workers", 0]
    assert check([str(word) for word in words]) == 0


@pytest.mark.parametrize(("version", "conv_mode"), [("v0", "v1"), ("v0.5", "v1"), ("tokenizer", "tokenizer")])
def test_the_next_command_names_the_template_of_the_training(version: str, conv_mode: str, tmp_path: Path) -> None:
    """As `--conv-mode`, `v0` means another template."""
    args = parse_args(command_line(tmp_path, version=version))
    assert next_command(args).endswith(f"--conv-mode {conv_mode}")

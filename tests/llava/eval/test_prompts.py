"""Prompts, the choice of the template, and the command lines of the original programs."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval import model_vqa_loader, run_llava
from llava.eval.answering.conv_mode import choose_conv_mode
from llava.eval.answering.prompts import add_image_markers, build_prompt, infer_conv_mode, plain_conv_mode
from llava.inference_options import option_names
from tests.golden import golden_dir

FLAGS = json.loads((golden_dir("llava") / "flags.json").read_text(encoding="utf-8"))["cli"]
PROGRAMS = {"llava/eval/model_vqa_loader.py": model_vqa_loader, "llava/eval/run_llava.py": run_llava}


def options_of(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    return {
        action.dest: {
            "flags": action.option_strings,
            "type": action.type.__name__ if action.type else "flag",
            "default": action.default,
            "required": action.required,
        }
        for action in parser._actions
        if action.dest != "help"
    }


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_original_option_has_its_type_and_default(program: str) -> None:
    ours = options_of(PROGRAMS[program].build_parser())
    assert len(FLAGS[program]) >= 10
    for option in FLAGS[program]:
        expected = {key: option[key] for key in ("flags", "type", "default", "required")}
        assert ours[option["dest"]] == expected
    added = set(ours) - {option["dest"] for option in FLAGS[program]}
    own = {"device", "torch_dtype", "seed", "batch_size", "num_workers", "restart", "limit", "allow_empty_chunk"}
    assert added - own - set(option_names()) == set()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-llama-2-13b-chat-lightning", "llava_llama_2"),
        ("LLaVA-Llama-2-mistral", "llava_llama_2"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-v1.5-7b-lora", "llava_v1"),
        ("llava-mpt-7b", "mpt"),
        ("llava-v1-mpt", "llava_v1"),
        ("llava-7b-v0", "llava_v0"),
        ("anything", "llava_v0"),
    ],
)
def test_template_by_the_name_of_the_model(name: str, mode: str) -> None:
    assert infer_conv_mode(name) == mode


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("llava-plain", "llava_v1", "llava_v1_mmtag"),
        ("llava-plain", "llava_v1_mmtag", "llava_v1_mmtag"),
        ("llava-plain-Finetune", "llava_v1", "llava_v1"),
        ("llava-v1.5-7b", "llava_v1", "llava_v1"),
    ],
)
def test_template_of_a_model_after_stage_one(name: str, mode: str, expected: str) -> None:
    assert plain_conv_mode(mode, name) == expected


@pytest.mark.parametrize(
    ("question", "images", "wrap", "expected"),
    [
        ("What?", 1, False, "<image>\nWhat?"),
        ("What?", 1, True, "<im_start><image><im_end>\nWhat?"),
        ("What?", 0, True, "What?"),
        ("What?", 2, False, "<image>\n<image>\nWhat?"),
        ("In <image-placeholder>, what?", 1, False, "In <image>, what?"),
        ("<image-placeholder>\n<image-placeholder>?", 2, True, "<im_start><image><im_end>\n<im_start><image><im_end>?"),
    ],
)
def test_image_markers(question: str, images: int, wrap: bool, expected: str) -> None:
    assert add_image_markers(question, images, mm_use_im_start_end=wrap, where="q:1") == expected


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("What is <image>?", 1, "q:1: the question holds a literal '<image>'"),
        ("What is <image>?", 0, "q:1: the question holds a literal '<image>'"),
        ("<image-placeholder>?", 2, "q:1: 1 '<image-placeholder>' in the question, but 2 image"),
        ("<image-placeholder>?", 0, "q:1: 1 '<image-placeholder>' in the question, but 0 image"),
    ],
)
def test_markers_must_fit_the_images(question: str, images: int, message: str) -> None:
    with pytest.raises(BadSampleError, match=message):
        add_image_markers(question, images, mm_use_im_start_end=False, where="q:1")


def test_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(FlagError, match=r"--conv-mode v9: no such template; there are .*'vicuna_v1'"):
        build_prompt("What?", "v9")


def test_a_template_named_against_the_model_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_conv_mode("vicuna_v1", "llava-v1.5-7b") == "vicuna_v1"
    warning = capsys.readouterr().out
    for part in ("WARNING", "llava-v1.5-7b", "'llava_v1'", "'vicuna_v1'"):
        assert part in warning
    assert choose_conv_mode(None, "llava-v1.5-7b") == "llava_v1"
    assert choose_conv_mode("llava_v1", "llava-v1.5-7b") == "llava_v1"
    assert capsys.readouterr().out == ""
    with pytest.raises(FlagError, match="--conv-mode v9"):
        choose_conv_mode("v9", "llava-v1.5-7b")

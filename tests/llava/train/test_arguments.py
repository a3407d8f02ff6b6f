"""Options: names, types and defaults of the originals, retired flags, refusals, composition with extensions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llava.errors import FlagError
from llava.extension import Extension, installed_extensions
from llava.runtime import checkpointing
from llava.runtime.retired_flags import translate_retired_flags
from llava.train.arguments import build_parser, parse_args
from llava.train.options import DataArguments, ModelArguments, TrainingArguments
from tests.golden import golden_dir

GROUPS = {
    "ModelArguments": "ModelArguments",
    "DataArguments": "DataArguments",
    "TrainingArguments_own_fields": "TrainingArguments",
}


def golden_options() -> list[Any]:
    content = json.loads((golden_dir("llava") / "flags.json").read_text())
    return [pytest.param(option, id=option["name"]) for group in GROUPS for option in content[group]]


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    return {action.dest: action for action in build_parser(installed_extensions())._actions}


@pytest.fixture
def required(tmp_path: Path) -> list[str]:
    data = tmp_path / "data.json"
    data.write_text("[]")
    return [
        *("--output_dir", str(tmp_path / "out"), "--data_path", str(data), "--mm_use_im_patch_token", "False"),
        *("--use_cpu", "True", "--report_to", "none"),
    ]


def test_golden_list_is_complete() -> None:
    assert len(golden_options()) == 34


@pytest.mark.parametrize("option", golden_options())
def test_upstream_option(option: dict[str, Any], actions: dict[str, argparse.Action]) -> None:
    classes = (ModelArguments, DataArguments, TrainingArguments)
    defaults = {field.name: field.default for cls in classes for field in dataclasses.fields(cls)}
    assert defaults[option["name"]] == option["default"]
    assert actions[option["name"]].help, "every option explains itself"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--evaluation_strategy", "no"], ["--eval_strategy", "no"]),
        (["--evaluation_strategy=no"], ["--eval_strategy", "no"]),
        (["--warmup_ratio", "0.03"], ["--warmup_steps", "0.03"]),
        (["--warmup_ratio", "0.03", "--warmup_steps", "7"], ["--warmup_steps", "7"]),
        (["--warmup_ratio", "0"], []),
        (["--group_by_length", "True"], ["--train_sampling_strategy", "group_by_length"]),
        (["--group_by_length", "False"], []),
        (["--overwrite_output_dir", "True", "--seed", "1"], ["--seed", "1"]),
        (["--no_cuda", "True"], ["--use_cpu", "True"]),
        (["--save_safetensors", "True"], []),
        (["--warmup-ratio", "0.03"], ["--warmup_steps", "0.03"]),
        (["--tf32", "False"], ["--tf32", "False"]),
    ],
)
def test_retired_flags(given: list[str], expected: list[str]) -> None:
    assert translate_retired_flags(given) == expected


@pytest.mark.parametrize("given", [["--save_safetensors", "False"], ["--per_gpu_train_batch_size", "4"]])
def test_retired_flags_refused(given: list[str]) -> None:
    with pytest.raises(FlagError, match=given[0]):
        translate_retired_flags(given)


def test_warmup_ratio_counts_updates(required: list[str]) -> None:
    training = parse_args([*required, "--warmup_ratio", "0.03"], {}).training
    assert training.get_warmup_steps(4) == 1  # ceil(0.03 * 4)
    assert training.get_warmup_steps(100) == 3


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--bits", "4"], "--bits 4"),
        (["--mm_use_im_start_end", "True"], "--mm_use_im_start_end"),
        (["--image_aspect_ratio", "anyres"], "--image_aspect_ratio anyres"),
        (["--image_aspect_ratio", "typo"], "--image_aspect_ratio typo"),
        (["--lora_bias", "all"], "--lora_bias all"),
        (["--lora_weight_path", "x"], "--lora_weight_path"),
        (["--on_bad_sample", "ignore"], "--on_bad_sample ignore"),
        (["--loss_reduction", "sum"], "--loss_reduction sum"),
        (["--data_path", "missing.json"], "missing.json"),
        (["--evaluation_strategy", "epoch"], "--eval_strategy epoch: there is nothing to evaluate on"),
        (["--do_eval", "True"], "there is nothing to evaluate on"),
        (["--image_folder", "missing"], "--image_folder missing"),
        (["--tune_mm_mlp_adapter", "True"], "needs --vision_tower"),
        (["--mm_patch_merge_type", "spatial"], "--mm_patch_merge_type"),
    ],
)
def test_refused(given: list[str], complaint: str, required: list[str]) -> None:
    with pytest.raises(FlagError, match=complaint):
        parse_args([*required, *given], {})


def test_all_problems_at_once(required: list[str]) -> None:
    with pytest.raises(FlagError) as caught:
        parse_args([*required, "--bits", "4", "--lora_bias", "all"], {})
    assert "--bits" in str(caught.value)
    assert "--lora_bias" in str(caught.value)


def test_unknown_option_is_an_error(required: list[str]) -> None:
    with pytest.raises(FlagError, match="--learning_rat"):
        parse_args([*required, "--learning_rat", "1"], {})


@dataclass
class _ClashingOptions:
    lora_alpha: int = 1


class _Clashing(Extension):
    name = "clashing"
    options = _ClashingOptions


def test_one_definition_per_option() -> None:
    with pytest.raises(FlagError, match="--lora_alpha"):
        build_parser({"clashing": _Clashing()})


@pytest.mark.parametrize("spelling", checkpointing.SPELLINGS)
def test_checkpointing_under_both_names(spelling: str, required: list[str]) -> None:
    """Published scripts have the older flags, transformers 5.24 the newer ones; neither brings a warning."""
    words = [*required, f"--{spelling}", "True", f"--{spelling}_kwargs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        training = parse_args([*words, '{"preserve_rng_state": true}']).training
    checkpointing.keep_the_graph(training)
    assert checkpointing.is_checkpointed(training)
    options = {"use_reentrant": False, "preserve_rng_state": True}
    assert {name: getattr(training, f"{name}_kwargs", options) for name in checkpointing.SPELLINGS} == dict.fromkeys(
        checkpointing.SPELLINGS, options
    )
    assert checkpointing.asks_for_reentrant(parse_args([*words, '{"use_reentrant": true}']).training)
    assert not checkpointing.is_checkpointed(parse_args(required).training)

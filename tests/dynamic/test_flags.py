"""The flags of `llava.train.train_sparse` against the original's table; what is refused; the published commands."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import FlagError
from llava.extension import installed_extensions
from llava.train.arguments import build_parser, parse_args
from llava.train.train_sparse import DEFAULTS
from tests.command_lines import Snippet, our_call, run_with_stand_ins
from tests.golden import golden_dir

TABLE = json.loads((golden_dir("dynamic") / "table_arguments.json").read_text(encoding="utf-8"))
GROUPS = ("ModelArguments", "DataArguments", "TrainingArguments", "SparseArguments")
OPTIONS = [pytest.param(option, id=option["name"]) for group in GROUPS for option in TABLE[group]]
TYPES = {"str": str, "int": int, "float": float}
SCRIPTS = {"run/train_dynamic_llava_7b.sh": "7b", "run/train_dynamic_llava_13b.sh": "13b"}
SPARSE_PROGRAM = "llava.train.train_sparse"


@pytest.fixture(scope="module")
def actions() -> dict[str, argparse.Action]:
    parser = build_parser(installed_extensions(), DEFAULTS)
    return {action.dest: action for action in parser._actions if f"--{action.dest}" in action.option_strings}


@pytest.fixture
def required(tmp_path: Path) -> list[str]:
    data = tmp_path / "data.json"
    data.write_text("[]")
    return [
        *("--output_dir", str(tmp_path / "out"), "--data_path", str(data), "--mm_use_im_patch_token", "False"),
        *("--use_cpu", "True", "--report_to", "none", "--dynamic", "True"),
    ]


def test_the_table_is_whole() -> None:
    assert len(OPTIONS) == 54


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_the_original(option: dict[str, Any], actions: dict[str, argparse.Action]) -> None:
    action = actions[option["name"]]
    assert action.default == option["default"]
    kind = option["type"].removeprefix("Optional[").rstrip("]")
    if kind == "bool":
        assert isinstance(action.default, bool)
    else:
        assert action.type is TYPES[kind]
    assert action.help


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--vision_keep_rate", "0"], "--vision_keep_rate 0"),
        (["--sparse_layer", "0"], "--sparse_layer 0"),
        (["--gumbel_end_tau", "0"], "--gumbel_end_tau 0"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "use_reentrant"),
        (["--attn_implementation", "eager"], "attention of its own"),
        (["--dynamic", "False", "--vision_keep_rate", "0.5"], "without effect while --dynamic is off"),
    ],
)
def test_refused(given: list[str], message: str, required: list[str]) -> None:
    with pytest.raises(FlagError, match=message):
        parse_args([*required, *given])


def test_a_default_without_an_option_is_refused() -> None:
    with pytest.raises(FlagError, match=r"\['dynamic'\], which no installed extension defines"):
        build_parser({}, DEFAULTS)


def test_it_is_off_unless_asked_for(required: list[str]) -> None:
    off = [word for word in required if word not in ("--dynamic", "True")]
    usual = [*off[: off.index("--use_cpu") + 1], "True", *off[off.index("--use_cpu") + 1 :]]
    assert "dynamic" not in parse_args(usual).extensions
    sparse = parse_args(usual, defaults=DEFAULTS)
    assert "dynamic" in sparse.extensions
    assert sparse.data.requires_image


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_values(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script passes is what the original's command says, read by the real parser."""
    (command,) = run_with_stand_ins(Snippet("block", f"bash {script}\n"), tmp_path)
    call = our_call(command)
    assert call is not None
    assert call.module == SPARSE_PROGRAM
    given = dict(zip(call.arguments[::2], call.arguments[1::2], strict=True))
    expected = dict(TABLE["published_7b_command_values"])
    assert expected.pop("sparse_layer") == "default 2"
    assert "--sparse_layer" not in given
    assert given.pop("--deepspeed").endswith("zero3.json")
    assert expected.pop("deepspeed") == "ZeRO-3"
    assert int(given["--per_device_train_batch_size"]) * 8 == expected.pop("global_batch_size")
    for name, value in expected.items():
        assert str(given[f"--{name}"]) == str(value) or float(given[f"--{name}"]) == float(value), name
    size = SCRIPTS[script]
    assert size in given["--model_name_or_path"]
    assert given["--output_dir"] == f"./results/dynamic-llava-{size}"
    monkeypatch.chdir(tmp_path)
    for name in ("--data_path", "--image_folder"):
        path = tmp_path / given[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name == "--image_folder" and not path.exists() else path.touch()
    options = [word for pair in given.items() for word in pair]
    args = parse_args([*options, "--use_cpu", "True", "--tf32", "False"], defaults=DEFAULTS)
    assert args.extensions["dynamic"]["sparse_layer"] == 2
    assert not args.extensions["dynamic"]["use_instruct_predictor"]

"""`--config FILE` of the three training programs: YAML by the names of the flags, or `run.json` of a former run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from hydralora import finetune
from hydralora.text.arguments import parse_args as parse_text
from llava.errors import FlagError, LlavaError
from llava.runtime.config_files.record import recorded_options
from llava.runtime.config_files.words import with_config
from llava.train.train import main, parse_args
from mma.lavin.train import main as train_lavin
from mma.lavin.train_arguments import parse_args as parse_lavin
from tests.hydralora.text import test_finetune
from tests.llava.train.test_training import HYDRA, command_line
from tests.mma.lavin.lavin_files import save_lavin_files, tiny_words


def table_of(words: list[str]) -> dict[str, Any]:
    """The options of a command line with a value each, of which YAML makes numbers and booleans where it can."""
    names = [word.removeprefix("--") for word in words[::2]]
    return dict(zip(names, map(yaml.safe_load, words[1::2]), strict=True))


def save(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path))
    assert files
    return {f"{path.relative_to(folder)}/{name}": value for path in files for name, value in load_file(path).items()}


def assert_equal(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


@pytest.mark.parametrize("options", [HYDRA, {"vision_tower": "none", "data_path": "text", "lora_enable": True}])
def test_a_run_from_a_file_and_from_its_record(options: dict[str, Any], tmp_path: Path) -> None:
    """Command line, YAML and run.json of the run from the YAML give the same weights, bit by bit."""
    if options.get("data_path") == "text":
        rows = [
            {"id": str(i), "conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]}
            for i in range(6)
        ]
        (tmp_path / "text.json").write_text(json.dumps(rows))
        options = options | {"data_path": tmp_path / "text.json"}
    words = command_line(tmp_path / "typed", **options, max_steps=2, warmup_ratio=0.5)
    main(words)
    table = table_of(words) | {"output_dir": str(tmp_path / "from-yaml")}
    main(["--config", save(tmp_path / "run.yaml", table)])
    record = str(tmp_path / "from-yaml" / "run.json")
    main([f"--config={record}", "--output_dir", str(tmp_path / "from-record")])
    assert_equal(tmp_path / "typed", tmp_path / "from-yaml")
    assert_equal(tmp_path / "typed", tmp_path / "from-record")
    # Another seed from the command line wins over that of the record, and changes what is trained.
    main(["--config", record, "--output_dir", str(tmp_path / "other"), "--seed", "7"])
    with pytest.raises(AssertionError):
        assert_equal(tmp_path / "typed", tmp_path / "other")


def test_a_text_run_from_a_file_and_from_its_record(tmp_path: Path) -> None:
    test_finetune.save_base(tmp_path / "base")
    test_finetune.save_data(tmp_path / "data")
    words = test_finetune.command_line(tmp_path, tmp_path / "typed", max_steps=2)
    finetune.main(words)
    table = table_of(words) | {"output_dir": str(tmp_path / "from-yaml")}
    table["trainable"] = table["trainable"].split(",")
    finetune.main(["--config", save(tmp_path / "run.yaml", table)])
    record = str(tmp_path / "from-yaml" / "run.json")
    finetune.main(["--config", record, "--output_dir", str(tmp_path / "from-record")])
    assert_equal(tmp_path / "typed", tmp_path / "from-yaml")
    assert_equal(tmp_path / "typed", tmp_path / "from-record")


def test_a_lavin_run_from_a_file_and_from_its_record(tmp_path: Path) -> None:
    files = save_lavin_files(tmp_path / "files")
    words = tiny_words(files, tmp_path / "typed", "--max_steps", "2")
    train_lavin(words)
    table, rest = {}, list(words)
    while rest:
        name, values = rest.pop(0).removeprefix("--"), []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        table[name] = values[0] if len(values) == 1 else values or True
    table |= {"output_dir": str(tmp_path / "from-yaml"), "options": list("ABCDE"), "pin_mem": False}
    train_lavin(["--config", save(tmp_path / "run.yaml", table)])
    record = str(tmp_path / "from-yaml" / "run.json")
    train_lavin(["--config", record, "--output_dir", str(tmp_path / "from-record")])
    assert_equal(tmp_path / "typed", tmp_path / "from-yaml")
    assert_equal(tmp_path / "typed", tmp_path / "from-record")


def test_flags_win(tmp_path: Path) -> None:
    table = table_of(command_line(tmp_path / "out")) | {
        "warmup_steps": 100,
        "learning_rate": "1e-3",
        "save_strategy": False,
    }
    file = save(tmp_path / "run.yaml", yaml.safe_dump(table).replace("save_strategy: false", "save_strategy: no"))
    args = parse_args(["--learning_rate", "5e-5", "--config", file, "--warmup_ratio", "0.25"])
    assert (args.training.learning_rate, args.training.warmup_steps) == (5e-5, 0.25)
    assert args.training.save_strategy == "no"
    assert {"learning_rate", "image_aspect_ratio"} <= args.given
    assert "config" not in args.given


VALUES: dict[str, tuple[str, list[str]]] = {
    "scalars are text": ("rate: 1e-4\nname: no\n", ["--rate=1e-4", "--name=no"]),
    "booleans": ("on: true\nswitch: true\noff: false\n", ["--on=true", "--switch"]),
    "a switch that is on": ("kept: false\n", ["--no_kept"]),
    "a list": ("several: [1, 2]\n", ["--several", "1", "2"]),
    "one of a list": ("several: 1\n", ["--several", "1"]),
    "a list for one text": ("name: [a, b]\n", ["--name=a,b"]),
    "a list of letters": ("letters: [A, B]\n", ["--letters=AB"]),
    "a table": ("name: {a: 1, b: true}\n", ['--name={"a": 1, "b": true}']),
    "null is not given": ("name: ~\nrate: null\n", []),
    "dashes, and a name that is a flag": ("no-such: 1\n", []),
    "JSON": ('{"name": "x", "several": ["y"]}', ["--name=x", "--several", "y"]),
    "nothing": ("", []),
}


def small_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("rate", "name", "on", "no_such"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--off", action="store_true")
    parser.add_argument("--kept", action="store_true", default=True)
    parser.add_argument("--no_kept", action="store_false", dest="kept")
    parser.add_argument("--several", nargs="+")
    parser.add_argument("--letters", type=list)
    return parser


@pytest.mark.parametrize("case", VALUES)
def test_values_become_words(case: str, tmp_path: Path) -> None:
    text, words = VALUES[case]
    words = ["--no_such=1"] if "dashes" in case else words
    found = with_config(["--config", save(tmp_path / "a.yaml", text), "typed"], [small_parser()])
    assert found[-1] == "typed"
    assert found[:-1] == [part for word in words for part in word.split("=", 1)]


WRONG = {
    "an unknown option": ("learning_rat: 1\n", r"a.yaml: unknown options learning_rat \(did you mean rate\?\)|unknown"),
    "a name twice": ("name: 1\nname: 2\n", r"a.yaml:2: name is there twice"),
    "a list": ("- name\n", "is not a table of options"),
    "an object": ("name: !!python/object/apply:os.system [true]\n", "a.yaml:1: .*os.system is not a kind of value"),
    "a tag": ("name: !secret x\n", "a.yaml:1: !secret is not a kind of value"),
    "no YAML": ("name: [1\n", r"a.yaml:2: is not YAML"),
    "a switch with a number": ("switch: 3\n", "switch is '3', expected true or false"),
    "a file in a file": ("config: other.yaml\n", "unknown options config"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    with pytest.raises(FlagError, match=message):
        with_config(["--config", save(tmp_path / "a.yaml", text)], [small_parser()])


def test_a_file_that_is_not_there_or_given_twice() -> None:
    with pytest.raises(FlagError, match="absent: cannot be read"):
        with_config(["--config", "absent"], [small_parser()])
    with pytest.raises(FlagError, match="given 2 times"):
        with_config(["--config", "a", "--config=b"], [small_parser()])
    with pytest.raises(FlagError, match="needs a file"):
        with_config(["--config", "--name", "x"], [small_parser()])


@pytest.mark.parametrize("parse", [parse_args, parse_text, parse_lavin])
def test_unknown_options_are_named_with_their_file_by_every_program(parse: Any, tmp_path: Path) -> None:
    file = save(tmp_path / "mine.yaml", "weigth_decay: 0.1\n")
    with pytest.raises(FlagError, match=r"mine\.yaml: unknown options weigth_decay \(did you mean weight_decay\?\)"):
        parse(["--config", file])


def test_where_a_former_run_wrote_is_not_taken_over(tmp_path: Path) -> None:
    record = {"arguments": {"model": {}, "data": {}, "training": {"seed": 3, "output_dir": "x"}}, "versions": {}}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(record | {"given": ["seed", "output_dir"]}))
    with pytest.raises(FlagError, match="pass a new --output_dir"):
        parse_args(["--config", str(file)])
    words = with_config(["--config", str(file), "--output_dir", "y"], [small_parser_of_training()])
    assert words == ["--seed", "3", "--output_dir", "y"]
    # A record of an earlier version does not say what was written down.
    file.write_text(json.dumps(record))
    words = with_config(["--config", str(file), "--output_dir", "y"], [small_parser_of_training()])
    assert words == ["--seed", "3", "--output_dir", "y"]
    file.write_text(json.dumps(record | {"arguments": {"training": [1]}}))
    with pytest.raises(LlavaError, match="damaged"):
        with_config(["--config", str(file), "--output_dir", "y"], [small_parser_of_training()])


def test_where_a_former_run_logged_is_not_taken_over(tmp_path: Path) -> None:
    own = {"run_name": "a", "project": "b", "trackio_space_id": "c", "trackio_bucket_id": "d"}
    record = {"arguments": {"training": {"seed": 3, **own}}, "versions": {}, "given": ["seed", *own]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    found = recorded_options(tmp_path / "run.json", record, {"seed", *own})
    assert found == {"seed": 3}


def test_null_means_not_given_except_in_a_record(tmp_path: Path) -> None:
    """A run on text alone is recorded with `"vision_tower": null`; in a file of options null leaves the default."""
    nothing = {"vision_tower": "none", "report_to": "none"}
    parser = argparse.ArgumentParser()
    for name in ("vision_tower", "report_to", "output_dir"):
        parser.add_argument(f"--{name}")
    plain = save(tmp_path / "a.yaml", "vision_tower: null\nreport_to: ~\n")
    assert with_config(["--config", plain], [parser], nothing) == []
    record = {"arguments": {"model": {"vision_tower": None}}, "versions": {}, "given": ["vision_tower"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    words = with_config(["--config", str(tmp_path / "run.json"), "--output_dir", "y"], [parser], nothing)
    assert words == ["--vision_tower", "none", "--output_dir", "y"]


def small_parser_of_training() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output_dir")
    return parser

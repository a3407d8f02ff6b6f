"""The table of transformers' options is complete, its page is current, and `--help` shows it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from hydralora.text.arguments import build_parser as text_parser
from llava.extension import installed_extensions
from llava.runtime.trainer_options import check, values
from llava.runtime.trainer_options.check import UnknownOptionWarning, warn_of_unknown_fields
from llava.runtime.trainer_options.listing import OptionParser
from llava.runtime.trainer_options.row import Kind, Table, but, no_effect, refused, table_of
from llava.runtime.trainer_options.table import SINCE, TABLE, fields_of_transformers, unknown_fields
from llava.train.arguments import build_parser as llava_parser
from tests.command_lines import ROOT
from tests.options_page import PAGE, PROGRAMS, page

pytestmark = pytest.mark.versions

RECORDED = {
    name: re.search(r"^transformers==(\S+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    for name in ("constraints.txt", "constraints-lowest.txt")
}


def is_installed(recorded: str) -> bool:
    found = RECORDED[recorded]
    assert found is not None
    return found[1] == transformers.__version__


@pytest.mark.skipif(not is_installed("constraints.txt"), reason="a newer transformers may have new options: they warn")
def test_every_field_of_the_newest_tested_version_has_a_row() -> None:
    assert unknown_fields() == []
    assert TABLE.keys() == set(fields_of_transformers())


def test_rows_without_a_field_are_those_of_newer_versions() -> None:
    absent = TABLE.keys() - set(fields_of_transformers())
    assert absent <= SINCE.keys()
    if is_installed("constraints-lowest.txt"):
        assert absent == SINCE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_a_field_without_a_row_is_found(name: str) -> None:
    """Negative control of the test above, for every row."""
    shorter = {other: row for other, row in TABLE.items() if other != name}
    assert unknown_fields(shorter) == ([name] if name in fields_of_transformers() else [])


def test_a_field_of_a_newer_version_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = [*fields_of_transformers(), "from_tomorrow"]
    monkeypatch.setattr(check, "unknown_fields", lambda: unknown_fields(fields=newer))
    warn_of_unknown_fields.cache_clear()
    with pytest.warns(UnknownOptionWarning, match=r"--from_tomorrow .* newer than every version"):
        warn_of_unknown_fields()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unknown_fields()
    warn_of_unknown_fields.cache_clear()


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_have_a_row_for_everything(program: str) -> None:
    table = PROGRAMS[program]
    assert table.keys() == TABLE.keys()
    for row in table.values():
        assert row.text
        assert row.instead or row.kind is not Kind.REFUSED
        assert row.limits or row.check is None or row.name in ("ddp_backend", "log_level", "log_level_replica")


def test_a_table_has_one_row_for_an_option_and_reasons() -> None:
    with pytest.raises(ValueError, match="two rows: \\['a'\\]"):
        table_of((no_effect("a", "x"), no_effect("a", "y")))
    with pytest.raises(ValueError, match="without a reason"):
        table_of((refused("a", "x", ""),))
    with pytest.raises(ValueError, match="does not have: \\['b'\\]"):
        but(table_of((no_effect("a", "x"),)), no_effect("b", "y"))


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.options_page writes it"


# --help


PARSERS: dict[str, Callable[[], Any]] = {
    "llava": lambda: llava_parser(installed_extensions()),
    "hydralora.finetune": text_parser,
}


@pytest.mark.parametrize("program", PARSERS)
def test_help_is_short_and_lists_own_options_first(program: str) -> None:
    parser: OptionParser = PARSERS[program]()
    text = parser.format_help()
    inherited = set(fields_of_transformers())
    own = {action.dest for action in parser._actions} - inherited - {"help"}
    explained = [name for name in re.findall(r"^  --(\w+)", text, re.MULTILINE) if name != "help"]
    assert own - {"==SUPPRESS=="} <= set(explained)
    assert len(explained) == len(set(explained))
    assert not re.search(r"--\w+-\w+", text.replace("--help-all", "")), "one spelling"
    assert len(text.splitlines()) < 210
    listed = text.split("options of transformers' Trainer:")[1]
    for kind in Kind:
        words = re.search(rf"^  {kind}: (.+?)(?=^  \S)", listed, re.MULTILINE | re.DOTALL)
        assert words is not None
        expected = {name for name, row in parser.table.items() if row.kind is kind and name in inherited}
        assert set(re.findall(r"--(\w+)", words[1])) == expected
    assert text.index("--lora_r") < text.index("options of transformers' Trainer")


@pytest.mark.parametrize("program", PARSERS)
def test_full_help_explains_all(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser: OptionParser = PARSERS[program]()
    for flag in ("--help-all", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([flag])
        assert not ended.value.code
    text = capsys.readouterr().out
    for name in set(parser.table) & set(fields_of_transformers()):
        assert f"\n  --{name}" in text
    assert "[refused: " in text
    assert len(text) > 2 * len(parser.format_help())


def test_both_spellings_are_accepted() -> None:
    for flag in ("--learning_rate", "--learning-rate"):
        assert llava_parser({}).parse_known_args([flag, "3"])[0].learning_rate == 3


@pytest.mark.parametrize("value", ["all", "non_padding", "some"])
def test_names_of_token_counts_are_accepted(value: str) -> None:
    assert (
        llava_parser({}).parse_known_args(["--include_num_input_tokens_seen", value])[0].include_num_input_tokens_seen
        == value
    )


# Checks of values


def test_a_scheduler_and_an_optimizer_are_tried() -> None:
    training = transformers.TrainingArguments(output_dir="x", use_cpu=True, lr_scheduler_type="cosine_with_min_lr")
    assert "min_lr" in check.trial_problems(training)[0]
    training.lr_scheduler_kwargs = {"min_lr": 1e-6}
    assert check.trial_problems(training) == []
    training.optim_args = "momentum=0.9"
    assert "does not read momentum" in check.trial_problems(training)[0]
    training.optim = transformers.training_args.OptimizerNames.SGD
    assert check.trial_problems(training) == []
    training.optim_args = "momentum"
    assert "--optim sgd, --optim_args momentum: cannot be made" in check.trial_problems(training)[0]


def test_settings_of_accelerate_may_be_an_object() -> None:
    training = transformers.TrainingArguments(output_dir="x", use_cpu=True)
    assert values.accelerator(training) is None
    training.accelerator_config.split_batches = True
    assert "split_batches" in str(values.accelerator(training))


def test_launchers_that_switch_fsdp_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.launcher_problems() == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "accelerate launch --use_fsdp" in check.launcher_problems()[0]


def test_a_value_that_switches_off_is_no_problem() -> None:
    table: Table = table_of((refused("seed", "x", "y"),))
    training: Any = transformers.TrainingArguments.__new__(transformers.TrainingArguments)
    vars(training).update(vars(SimpleNamespace(seed=None)))
    assert check.option_problems(training, table) == []
    training.seed = 3
    assert check.option_problems(training, table) == ["--seed 3: is not supported: x; y"]

"""A plugin of pytest for a checkout of PEFT: its tests of LoRA run with HydraLoRA, without a change to their files.

Rows of a test's table that have `LoraConfig` are replaced by the same ones with `HydraLoraConfig`, with one expert and
with three; rows of other methods, and tests without a row of ours, are left out. An error whose words are in `REFUSALS`
is a refusal, not a failure. `--outcomes FILE` writes what was found as JSON, for `record.py`.

This module imports nothing from the folder `tests`: PEFT's tests are a package of that name too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from hydralora import HydraLoraConfig
from hydralora.tuner.lora_options import REFUSED

EXPERTS = (1, 3)
REFUSALS = {
    r"cannot be merged: the router weights the experts for every": "several experts are not merged",
    r"weights \d+ experts for each input": "several experts are not merged",
    r"does not have these options of LoRA\. (\w+): ": r"option \1",
    r"(init_lora_weights) is '(\w+)', expected": r"option \1 = \2",
    r"target module '[\w.]+' is a (\w+);": r"layer \1",
    r"Regex pattern did not match\.\s+Expected regex: .*\s+Actual message: (.*)": r"in other words: \1",
}
"""Reasons by the words of an error. The last one: PEFT expects an error of this type, and compares its own words."""

_OF_PEFT = (
    "LoRA of the installed PEFT fails it too: a second adapter that is loaded to be trained trains before it is active"
)
EXPLAINED = {
    ("test_loading_model_requires_grad_set_correctly", ""): _OF_PEFT,
    ("test_loading_model_with_modules_to_save_requires_grad_set_correctly", ""): _OF_PEFT,
    (
        "test_only_params_are_updated",
        "Vanilla MLP 4 LoRA, 3 experts",
    ): "the default factor is 4 times LoRA's, and at the "
    "test's learning rate of 0.5 the weights reach 1e27, where the softmax of a router has no gradient",
}
"""Failures that are not defects, by test and row."""

OF_ROW = ("option", "layer")
"""Beginnings of the reasons that hold for every test of a row."""

FIELDS = {item.name for item in dataclasses.fields(HydraLoraConfig)}


@dataclasses.dataclass
class Found:
    """What the tests found.

    Attributes:
        outcomes: of each test: `passed`; `refused: `, `skipped: ` or `explained: ` with the reason; or `failed: `
            with the error.
        refused_rows: the reason for each row whose options or layers are refused; one test has tried it.
    """

    outcomes: dict[str, str] = dataclasses.field(default_factory=dict)
    refused_rows: dict[str, str] = dataclasses.field(default_factory=dict)


FOUND = pytest.StashKey[Found]()
STAND_IN = pytest.StashKey[types.ModuleType]()


def options(given: dict[str, Any], experts: int) -> dict[str, Any]:
    """Options of LoRA as those of HydraLoRA; what it does not have is handed over all the same, to be refused."""
    return {"lora_nums": experts} | given


def configuration(given: LoraConfig) -> HydraLoraConfig:
    """The configuration of HydraLoRA with the options that differ from LoRA's own defaults."""
    plain = LoraConfig()
    skipped = {"peft_type", "runtime_config", "peft_version", "auto_mapping"}
    names = [item.name for item in dataclasses.fields(given) if item.name not in skipped]
    changed = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(plain, name)}
    return HydraLoraConfig(**options(changed, EXPERTS[-1]))


def translated(names: list[str], row: Any) -> Iterator[Any]:
    """The rows of HydraLoRA for one of a table of configurations; none for other methods."""
    values = row.values if hasattr(row, "values") and not isinstance(row, dict) else row
    values = list(values) if len(names) > 1 else [values]
    if LoraConfig not in values and not any(type(value) is LoraConfig for value in values):
        return
    tables = [value for name, value in zip(names, values, strict=True) if name.startswith("config_kwargs")]
    refused = any(name in REFUSED for table in tables for name in table)
    for experts in EXPERTS if tables and not refused else EXPERTS[-1:]:
        ours = [_translated(name, value, experts) for name, value in zip(names, values, strict=True)]
        yield tuple(ours) if len(names) > 1 else ours[0]


def _translated(name: str, value: Any, experts: int) -> Any:
    """One value of a row, by the name of its parameter."""
    if value is LoraConfig:
        return HydraLoraConfig
    if type(value) is LoraConfig:
        return configuration(value)
    if name.startswith("config_kwargs"):
        return options(value, experts)
    if name == "test_name":
        return f"{value}, {experts} experts"
    return "hydralora" if name == "tuner_method" and value == "lora" else value


def is_ours(value: Any) -> bool:
    """Whether a value, or one of a row, is the configuration of HydraLoRA or its class."""
    if isinstance(value, list | tuple):
        return any(is_ours(item) for item in value)
    return value is HydraLoraConfig or isinstance(value, HydraLoraConfig)


def row_of(item: pytest.Item) -> str:
    """The row of the table that a test is run with; empty without a table."""
    return str(item.callspec.params.get("test_name", "")) if isinstance(item, pytest.Function) else ""


def reason_of(error: BaseException | None) -> str | None:
    """Why an error, or one that it came from, is a refusal; None: it is not one."""
    while error is not None:
        for words, reason in REFUSALS.items():
            match = re.search(words, str(error))
            if match:
                return match.expand(reason)
        error = error.__cause__ or error.__context__
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", help="file for what was found, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests' helpers be imported without diffusers, whose models are not used by any test of ours."""
    config.stash[FOUND] = Found()
    if importlib.util.find_spec("diffusers") is None:
        stand_in = types.ModuleType("diffusers")
        stand_in.StableDiffusionPipeline = None  # type: ignore[attr-defined]
        sys.modules["diffusers"] = config.stash[STAND_IN] = stand_in


def pytest_collection_finish(session: pytest.Session) -> None:
    """What asks for diffusers while a test runs is told that it is missing."""
    if STAND_IN in session.config.stash:
        del sys.modules["diffusers"]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Translate the tables; a table that several tests share is translated once, in place."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
        rows = mark.args[1] if len(mark.args) > 1 else None
        if isinstance(rows, list) and any(name.startswith(("config", "peft_config")) for name in names):
            ours = [new for row in rows for new in translated(names, row)]
            if ours or not any(is_ours(row) for row in rows):
                rows[:] = ours or rows


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if hasattr(item, "callspec") and any(map(is_ours, item.callspec.params.values()))]
    kept = set(ours)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = ours


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A row whose options or layers are refused is tried by one test: all would be refused in the same words."""
    if row_of(item) in item.config.stash[FOUND].refused_rows:
        pytest.skip("its row is refused")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    found = item.config.stash[FOUND]
    error = call.excinfo.value if call.excinfo else None
    words = " ".join(str(error).split())[:200]
    if report.failed and error is None:  # a test that is marked as failing, and passes
        found.outcomes[item.nodeid] = "passed, which PEFT does not expect of its own methods"
    elif report.failed:
        reason = reason_of(error)
        if reason is None:
            explained = (
                EXPLAINED.get((item.originalname or "", row_of(item))) if isinstance(item, pytest.Function) else None
            )
            known = explained is not None and words.startswith("assert not True")
            found.outcomes[item.nodeid] = f"explained: {explained}" if known else f"failed: {words}"
            return
        report.outcome, report.wasxfail = "skipped", reason
        found.outcomes[item.nodeid] = f"refused: {reason}"
        if reason.startswith(OF_ROW) and row_of(item):
            found.refused_rows[row_of(item)] = reason
    elif report.skipped:
        if hasattr(report, "wasxfail"):
            words = "PEFT expects it to fail"
        if row_of(item) not in found.refused_rows:
            found.outcomes[item.nodeid] = f"skipped: {words}"
    elif report.when == "call":
        found.outcomes[item.nodeid] = "passed"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--outcomes")
    if path:
        found = dataclasses.asdict(session.config.stash[FOUND])
        Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")

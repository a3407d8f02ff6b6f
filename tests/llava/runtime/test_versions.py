"""A library outside the tested range is named once, when a model is made; pip's own ranges are the tested ones."""

from __future__ import annotations

import itertools
import re
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model

from hydralora.tuner import HydraLoraConfig
from llava.model.builder import load_pretrained_model
from llava.runtime import versions
from tests.golden import golden_dir
from tests.model.backbones import plain_model

pytestmark = pytest.mark.versions


def load_llava() -> object:
    return load_pretrained_model(str(golden_dir("llava") / "tiny-llava-v1.5"), device="cpu")


def adapt() -> object:
    return get_peft_model(plain_model("llama"), HydraLoraConfig(target_modules=["q_proj"]))


@pytest.fixture(autouse=True)
def _a_new_process() -> None:
    versions.warn_once.cache_clear()


@pytest.mark.parametrize("make", [load_llava, adapt])
@pytest.mark.parametrize("installed", ["5.99.0", "6.0.0.dev0", "5.1.0"])
def test_one_warning_and_the_model_is_made(make: object, installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed if name == "transformers" else version(name))
    expected = rf"transformers {re.escape(installed)} is not among the versions .*\(transformers<.*>=.*\)"
    with pytest.warns(versions.UntestedVersionWarning, match=expected):
        assert make() is not None  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error", versions.UntestedVersionWarning)
        assert make() is not None  # type: ignore[operator]


@pytest.mark.parametrize("make", [load_llava, adapt])
def test_no_warning_on_a_tested_version(make: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", versions.UntestedVersionWarning)
        assert make() is not None  # type: ignore[operator]


def test_local_builds_are_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: version(name).partition("+")[0] + "+somewhere")
    assert versions.outside_tested_range() == []


def test_the_ranges_have_both_ends_and_hold_the_recorded_sets(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name not in ("dev", "lmms")}
    requirements = [Requirement(line) for line in itertools.chain(project["dependencies"], *extras.values())]
    recorded = {
        name: dict(line.split("==") for line in (repository / name).read_text().split() if "==" in line)
        for name in ("constraints.txt", "constraints-lowest.txt")
    }
    for requirement in requirements:
        key = requirement.name.lower().replace("_", "-")
        bounds = {specifier.operator: specifier.version for specifier in requirement.specifier}
        assert ">=" in bounds, f"{requirement}: without a lower bound"
        assert "<" in bounds or key == "packaging", f"{requirement}: without an upper bound"
        if key == "flash-attn":  # needs a compiler for CUDA
            continue
        if key == "trl":  # needs a later version of datasets than the lowest
            assert key not in recorded["constraints-lowest.txt"]
            assert Version(recorded["constraints.txt"][key]) in requirement.specifier
            continue
        newest, lowest = (Version(recorded[name][key]) for name in recorded)
        assert lowest in requirement.specifier
        assert newest in requirement.specifier
        assert lowest <= newest
    for name in versions.LIBRARIES:
        bound = next(each for each in requirements if each.name == name).specifier
        low = next(Version(each.version) for each in bound if each.operator == ">=")
        assert Version(recorded["constraints-lowest.txt"][name]).release[:2] == low.release[:2]

"""PEFT's own tests with HydraLoRA in place of LoRA find what is recorded in `found.json`.

Running them needs PEFT_TESTS_DIR, a checkout of huggingface/peft; see `make test-peft` and docs/hydralora_lora.md.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.hydralora.peft_tests import record

PAGE = record.ROOT / "docs" / "hydralora_lora.md"
CHECKOUT = os.environ.get("PEFT_TESTS_DIR", "")
NEEDS_CHECKOUT = pytest.mark.skipif(not CHECKOUT, reason="PEFT_TESTS_DIR is not set; see `make test-peft`")


@NEEDS_CHECKOUT
def test_the_checkout_is_of_the_recorded_version() -> None:
    """What another version's tests find, and what they find of another version, is another record."""
    recorded = record.read()
    assert recorded["installed"] == version("peft")
    changed = [name for name, digest in record.digests(Path(CHECKOUT)).items() if recorded["files"][name] != digest]
    assert not changed, f"{CHECKOUT}: {changed} are not those of {recorded['source']}, which the record is of"


@NEEDS_CHECKOUT
@pytest.mark.parametrize("part", record.PARTS)
def test_what_tests_of_peft_find(part: str) -> None:
    found = record.run(Path(CHECKOUT), part)
    print("\n" + record.line_of(part, found), flush=True)
    assert record.differences(found, record.read()["parts"][part]) == []


def test_the_record_is_passes_and_refusals() -> None:
    parts = record.read()["parts"]
    assert list(parts) == sorted(record.PARTS)
    totals = sum((record.counts(part) for part in parts.values()), start=record.Counter())
    assert totals["passed"] > 700
    assert totals.keys() == {"passed", "refused", "skipped", "explained"}
    assert totals["explained"] == 3


def test_a_difference_is_found_in_both_directions() -> None:
    """A new failure, a new test, and a recorded one that was not reached."""
    recorded = record.read()["parts"]["several adapters"]
    assert record.differences(recorded, recorded) == []
    found = copy.deepcopy(recorded)
    first, second, *_ = sorted(name for name, outcome in recorded["outcomes"].items() if outcome == "passed")
    found["outcomes"][first] = "failed: 1 == 2"
    del found["outcomes"][second]
    found["outcomes"]["tests/test_new.py::test"] = "passed"
    row = next(iter(found["refused_rows"]))
    del found["refused_rows"][row]
    assert sorted(record.differences(found, recorded)) == sorted(
        [
            f"{first}: failed: 1 == 2; recorded: passed",
            f"{second}: not run; recorded: passed",
            "tests/test_new.py::test: passed; recorded: nothing",
            f"{row}: not run; recorded: {recorded['refused_rows'][row]}",
        ]
    )


def test_a_folder_without_the_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkout of huggingface/peft"):
        record.digests(tmp_path)


def test_the_page_has_the_numbers_of_the_record() -> None:
    recorded = record.read()
    text = PAGE.read_text(encoding="utf-8")
    assert recorded["source"] in text
    totals = sum((record.counts(part) for part in recorded["parts"].values()), start=record.Counter())
    rows = {row for part in recorded["parts"].values() for row in part["refused_rows"]}
    expected = (
        f"{totals['passed']} tests pass, {totals['refused']} end in a refusal, {totals['skipped']} skip themselves and "
        f"{totals['explained']} fail for a reason that the plugin states; of {len(rows)} rows"
    )
    assert expected in " ".join(text.split())


@pytest.mark.parametrize("given", [False, True])
def test_the_whole_check_has_the_checkout_if_one_is_given(given: bool, tmp_path: Path) -> None:
    """`.ci/run`, with a `make` that notes what it is asked for; `make test` does not run PEFT's tests too."""
    shutil.copytree(record.ROOT / ".ci", tmp_path / "clone" / ".ci")
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$* ${{PEFT_TESTS_DIR:-}}" >> {tmp_path}/asked\n')
    make.chmod(0o755)
    others = {name: value for name, value in os.environ.items() if not name.endswith(("_TESTS_DIR", "_UPSTREAM_DIR"))}
    environment = others | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"PEFT_TESTS_DIR": "/a b"} if given else {})
    command = [str(tmp_path / "clone" / ".ci" / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "test " in asked
    assert ("test-peft PEFT_TESTS_DIR=/a b " in asked) == given
    assert ("test-peft: not run" in done.stdout) != given

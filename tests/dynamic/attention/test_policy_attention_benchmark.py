"""The benchmark of policy attention runs, and writes what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import policy_attention
from llava.errors import FlagError


def in_this_process(function: Callable[..., int], *arguments: Any) -> int:
    return function(*arguments)


def test_the_record_and_the_table_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_attention, "in_fresh_process", in_this_process)
    output = tmp_path / "results" / "here.json"
    command = ["--device", "cpu", "--lengths", "32", "64", "--heads", "2", "--rounds", "2", "--output", str(output)]
    policy_attention.main(command)
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [case["length"] for case in record["cases"]] == [32, 64]
    for case in record["cases"]:
        assert case["seconds"].keys() == case["peak_bytes"].keys() == {"eager", "blockwise", "dense"}
        assert all(0 < times["min"] <= times["median"] for times in case["seconds"].values())
        assert case["speedup_over_eager"]["eager"] == 1
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert policy_attention.table(record["cases"]) in text
    assert text.count("\n| ") == 4


def test_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix at 1024 tokens is 8 MiB for two heads, and the original keeps several."""
    args = policy_attention.build_parser().parse_args(["--device", "cpu", "--heads", "2", "--dtype", "float32"])
    grown = policy_attention.in_fresh_process(policy_attention.peak_bytes, "eager", 1024, args)
    assert 16 * 2**20 < grown < 500 * 2**20


def test_an_output_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match=r"ends in \.json"):
        policy_attention.main(["--output", str(tmp_path / "here.txt")])

"""The plans of the published 7B commands are those of `published.json`.

They are computed again only where the environment variable `ALL_PLANS` is set: each takes two minutes or more.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.llava.train.plan.published import COMMANDS, RECORD, numbers, words_of, write_folders

RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
EXACT = ("device", "gpus", "batch", "gradient_accumulation_steps", "length", "trained", "fits", "waits", "step_waits")
WEIGHTS = 13_484_000_000
"""Bytes of the language model in half precision, about; the tower has another 600 MB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    write_folders(root)
    return root


@pytest.mark.skipif("ALL_PLANS" not in os.environ, reason="takes ten minutes; set ALL_PLANS=1")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_numbers_are_kept(name: str, folder: Path) -> None:
    """Bytes and operations within 2 percent: a version of transformers or torch may make another temporary tensor."""
    known = RECORDED[name]
    found = numbers(name, folder)
    assert {key: found[key] for key in EXACT} == {key: known[key] for key in EXACT}
    assert found["bytes"] == pytest.approx(known["bytes"], rel=0.02, abs=2**20)
    assert found["total"] == pytest.approx(known["total"], rel=0.02)
    assert found["flops"] == pytest.approx(known["flops"], rel=0.02)
    assert found["largest_batch"] == pytest.approx(known["largest_batch"], abs=1)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_record_is_of_the_published_command(name: str, folder: Path) -> None:
    """Its batch, length and processes; all weights are on a GPU, or a share of them by stage 3."""
    known, words = RECORDED[name], words_of(COMMANDS[name], folder)
    options = dict(itertools.pairwise(words))
    assert str(known["batch"]) == options["--per_device_train_batch_size"]
    assert str(known["length"]) == options["--model_max_length"]
    shared = known["gpus"] if "zero3" in options.get("--deepspeed", "") else 1
    assert known["bytes"]["weights"] == pytest.approx(WEIGHTS / shared, rel=0.15)
    assert known["fits"]
    assert known["largest_batch"] >= known["batch"]

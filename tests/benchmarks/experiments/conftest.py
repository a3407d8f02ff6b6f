"""The NLVR files, which are not part of the repository, for the tests that look at real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def nlvr_dir() -> Path:
    """The folder that the environment variable LLAVA_NLVR_DIR names; the test is skipped without the variable."""
    name = os.environ.get("LLAVA_NLVR_DIR")
    if not name:
        pytest.skip("set LLAVA_NLVR_DIR to a folder with train.json and val.jsonl of NLVR to run this test")
    folder = Path(name)
    assert (folder / "train.json").is_file(), f"LLAVA_NLVR_DIR={name}: has no train.json"
    return folder

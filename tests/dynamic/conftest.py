"""What several tests of Dynamic-LLaVA share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dynamic.golden_model import write_tower


@pytest.fixture(scope="session")
def golden_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the golden cases' vision tower."""
    return write_tower(tmp_path_factory.mktemp("golden") / "tower")
